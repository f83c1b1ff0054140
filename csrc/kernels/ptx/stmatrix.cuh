// Stores of 8x8 matrices of 16-bit elements to shared memory.
#pragma once

namespace jfa::ptx {

// Stores four 8x8 matrices that together are a 16x16 accumulator block packed to 16 bits; lane l
// gives the address of row l % 8 of matrix l / 8. One instruction from sm_90 on (PTX ISA
// 9.7.14.5.16); before it the lane that holds a word fetches its row's address from the lane that
// has it.
// Threads: a whole warp. Needs: every row address aligned to 16 bytes.
__device__ __forceinline__ void store_matrices(unsigned shared, const unsigned (&words)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned row = __shfl_sync(0xffffffffu, shared, matrix * 8 + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + lane % 4 * 4), "r"(words[matrix])
                 : "memory");
  }
#endif
}

#if __CUDA_ARCH__ >= 900
// The same, each matrix transposed on the way: a row in memory is a column of the accumulator.
__device__ __forceinline__ void store_matrices_transposed(unsigned shared,
                                                          const unsigned (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}
#endif

}  // namespace jfa::ptx
