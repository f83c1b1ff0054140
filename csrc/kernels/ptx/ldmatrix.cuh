// Loads of 8x8 matrices of 16-bit elements from shared memory (PTX ISA 9.7.14.5.15).
#pragma once

namespace jfa::ptx {

// Loads four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
// Threads: a whole warp. Needs: every row address aligned to 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&words)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed on the way.
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&words)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared)
               : "memory");
}

}  // namespace jfa::ptx
