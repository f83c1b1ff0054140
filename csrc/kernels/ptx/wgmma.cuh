// Products of a warpgroup of four warps, asynchronous, from shared memory (PTX ISA 9.7.15, sm_90a).
//
// acc (64 x kColumns, fp32) += A (64 x 16) * B (16 x kColumns). Warp w holds rows 16 w to 16 w + 15
// in the layout of tile/fragment.cuh's accumulators. A comes from registers, packed as for
// mma.sync, or from shared memory; B from shared memory. Shared operands are named by descriptors
// (tile/descriptor.cuh).
//
// Between the first product of a batch and wgmma_wait, nothing else may touch the accumulators and
// the registers of A.
#pragma once

#include <ptx/element.cuh>

namespace jfa::ptx {

// Orders earlier accesses to registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the latest committed batches are in flight. Batches end in order.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An asm statement names its operands by number, so each width spells its own list: kColumns / 16
// groups of eight accumulator registers, then the other operands.

// clang-format off
#define JFA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JFA_REGISTERS_32 JFA_REGISTERS_16 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define JFA_REGISTERS_48 JFA_REGISTERS_32 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define JFA_REGISTERS_64 JFA_REGISTERS_48 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define JFA_REGISTERS_80 JFA_REGISTERS_64 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define JFA_REGISTERS_96 JFA_REGISTERS_80 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define JFA_REGISTERS_112 JFA_REGISTERS_96 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define JFA_REGISTERS_128 JFA_REGISTERS_112 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define JFA_REGISTERS_144 JFA_REGISTERS_128 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define JFA_REGISTERS_160 JFA_REGISTERS_144 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define JFA_REGISTERS_176 JFA_REGISTERS_160 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define JFA_REGISTERS_192 JFA_REGISTERS_176 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define JFA_REGISTERS_208 JFA_REGISTERS_192 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define JFA_REGISTERS_224 JFA_REGISTERS_208 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define JFA_REGISTERS_240 JFA_REGISTERS_224 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define JFA_REGISTERS_256 JFA_REGISTERS_240 ", " "%120, %121, %122, %123, %124, %125, %126, %127"
#define JFA_VALUES_16(constraint, d) constraint(d[0][0]), constraint(d[0][1]), constraint(d[0][2]), constraint(d[0][3]), constraint(d[1][0]), constraint(d[1][1]), constraint(d[1][2]), constraint(d[1][3])
#define JFA_VALUES_32(constraint, d) JFA_VALUES_16(constraint, d), constraint(d[2][0]), constraint(d[2][1]), constraint(d[2][2]), constraint(d[2][3]), constraint(d[3][0]), constraint(d[3][1]), constraint(d[3][2]), constraint(d[3][3])
#define JFA_VALUES_48(constraint, d) JFA_VALUES_32(constraint, d), constraint(d[4][0]), constraint(d[4][1]), constraint(d[4][2]), constraint(d[4][3]), constraint(d[5][0]), constraint(d[5][1]), constraint(d[5][2]), constraint(d[5][3])
#define JFA_VALUES_64(constraint, d) JFA_VALUES_48(constraint, d), constraint(d[6][0]), constraint(d[6][1]), constraint(d[6][2]), constraint(d[6][3]), constraint(d[7][0]), constraint(d[7][1]), constraint(d[7][2]), constraint(d[7][3])
#define JFA_VALUES_80(constraint, d) JFA_VALUES_64(constraint, d), constraint(d[8][0]), constraint(d[8][1]), constraint(d[8][2]), constraint(d[8][3]), constraint(d[9][0]), constraint(d[9][1]), constraint(d[9][2]), constraint(d[9][3])
#define JFA_VALUES_96(constraint, d) JFA_VALUES_80(constraint, d), constraint(d[10][0]), constraint(d[10][1]), constraint(d[10][2]), constraint(d[10][3]), constraint(d[11][0]), constraint(d[11][1]), constraint(d[11][2]), constraint(d[11][3])
#define JFA_VALUES_112(constraint, d) JFA_VALUES_96(constraint, d), constraint(d[12][0]), constraint(d[12][1]), constraint(d[12][2]), constraint(d[12][3]), constraint(d[13][0]), constraint(d[13][1]), constraint(d[13][2]), constraint(d[13][3])
#define JFA_VALUES_128(constraint, d) JFA_VALUES_112(constraint, d), constraint(d[14][0]), constraint(d[14][1]), constraint(d[14][2]), constraint(d[14][3]), constraint(d[15][0]), constraint(d[15][1]), constraint(d[15][2]), constraint(d[15][3])
#define JFA_VALUES_144(constraint, d) JFA_VALUES_128(constraint, d), constraint(d[16][0]), constraint(d[16][1]), constraint(d[16][2]), constraint(d[16][3]), constraint(d[17][0]), constraint(d[17][1]), constraint(d[17][2]), constraint(d[17][3])
#define JFA_VALUES_160(constraint, d) JFA_VALUES_144(constraint, d), constraint(d[18][0]), constraint(d[18][1]), constraint(d[18][2]), constraint(d[18][3]), constraint(d[19][0]), constraint(d[19][1]), constraint(d[19][2]), constraint(d[19][3])
#define JFA_VALUES_176(constraint, d) JFA_VALUES_160(constraint, d), constraint(d[20][0]), constraint(d[20][1]), constraint(d[20][2]), constraint(d[20][3]), constraint(d[21][0]), constraint(d[21][1]), constraint(d[21][2]), constraint(d[21][3])
#define JFA_VALUES_192(constraint, d) JFA_VALUES_176(constraint, d), constraint(d[22][0]), constraint(d[22][1]), constraint(d[22][2]), constraint(d[22][3]), constraint(d[23][0]), constraint(d[23][1]), constraint(d[23][2]), constraint(d[23][3])
#define JFA_VALUES_208(constraint, d) JFA_VALUES_192(constraint, d), constraint(d[24][0]), constraint(d[24][1]), constraint(d[24][2]), constraint(d[24][3]), constraint(d[25][0]), constraint(d[25][1]), constraint(d[25][2]), constraint(d[25][3])
#define JFA_VALUES_224(constraint, d) JFA_VALUES_208(constraint, d), constraint(d[26][0]), constraint(d[26][1]), constraint(d[26][2]), constraint(d[26][3]), constraint(d[27][0]), constraint(d[27][1]), constraint(d[27][2]), constraint(d[27][3])
#define JFA_VALUES_240(constraint, d) JFA_VALUES_224(constraint, d), constraint(d[28][0]), constraint(d[28][1]), constraint(d[28][2]), constraint(d[28][3]), constraint(d[29][0]), constraint(d[29][1]), constraint(d[29][2]), constraint(d[29][3])
#define JFA_VALUES_256(constraint, d) JFA_VALUES_240(constraint, d), constraint(d[30][0]), constraint(d[30][1]), constraint(d[30][2]), constraint(d[30][3]), constraint(d[31][0]), constraint(d[31][1]), constraint(d[31][2]), constraint(d[31][3])
// clang-format on

// Wgmma<Element, kColumns>: the product of one width. `accumulate` is 0 to overwrite acc, in the
// registers that it has; overwrite() may do so in others.
// kTransposed: rows of B's shared tile are rows of B, otherwise they are its columns.
template <class Element, int kColumns>
struct Wgmma;

#define JFA_WGMMA(ELEMENT, TYPE, COLUMNS, A0, A1, A2, A3, A4, A5, A6)                              \
  template <>                                                                                      \
  struct Wgmma<ELEMENT, COLUMNS> {                                                                 \
    template <bool kTransposed>                                                                    \
    static __device__ __forceinline__ void overwrite(float (&d)[COLUMNS / 8][4],                   \
                                                     unsigned long long a, unsigned long long b) { \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                    \
          " {" JFA_REGISTERS_##COLUMNS "}, " A0 ", " A1 ", p, 1, 1, 0, " A2 ";\n}\n"               \
          : JFA_VALUES_##COLUMNS("=f", d)                                                          \
          : "l"(a), "l"(b), "n"(kTransposed ? 1 : 0));                                             \
    }                                                                                              \
    template <bool kTransposed>                                                                    \
    static __device__ __forceinline__ void multiply(float (&d)[COLUMNS / 8][4],                    \
                                                    unsigned long long a, unsigned long long b,    \
                                                    int accumulate) {                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2                                          \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE     \
                   " {" JFA_REGISTERS_##COLUMNS "}, " A0 ", " A1 ", p, 1, 1, 0, " A3 ";\n}\n"      \
                   : JFA_VALUES_##COLUMNS("+f", d)                                                 \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed ? 1 : 0));                   \
    }                                                                                              \
    template <bool kTransposed>                                                                    \
    static __device__ __forceinline__ void multiply(float (&d)[COLUMNS / 8][4],                    \
                                                    const unsigned (&a)[4], unsigned long long b,  \
                                                    int accumulate) {                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A5                                          \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE     \
                   " {" JFA_REGISTERS_##COLUMNS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " A4         \
                                                ", p, 1, 1, " A6 ";\n}\n"                          \
                   : JFA_VALUES_##COLUMNS("+f", d)                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),          \
                     "n"(kTransposed ? 1 : 0));                                                    \
    }                                                                                              \
  };
#define JFA_WGMMA_BOTH(COLUMNS, ...)                \
  JFA_WGMMA(BFloat16, "bf16", COLUMNS, __VA_ARGS__) \
  JFA_WGMMA(Float16, "f16", COLUMNS, __VA_ARGS__)

JFA_WGMMA_BOTH(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
JFA_WGMMA_BOTH(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
JFA_WGMMA_BOTH(48, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
JFA_WGMMA_BOTH(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
JFA_WGMMA_BOTH(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
JFA_WGMMA_BOTH(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
JFA_WGMMA_BOTH(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
JFA_WGMMA_BOTH(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
JFA_WGMMA_BOTH(144, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
JFA_WGMMA_BOTH(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
JFA_WGMMA_BOTH(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
JFA_WGMMA_BOTH(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
JFA_WGMMA_BOTH(208, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
JFA_WGMMA_BOTH(224, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
JFA_WGMMA_BOTH(240, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
JFA_WGMMA_BOTH(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef JFA_WGMMA_BOTH
#undef JFA_WGMMA

}  // namespace jfa::ptx
