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
#define JFA_VALUES_16(d) "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3])
#define JFA_VALUES_32(d) JFA_VALUES_16(d), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
#define JFA_VALUES_48(d) JFA_VALUES_32(d), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3])
#define JFA_VALUES_64(d) JFA_VALUES_48(d), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])
#define JFA_VALUES_80(d) JFA_VALUES_64(d), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3])
#define JFA_VALUES_96(d) JFA_VALUES_80(d), "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3])
#define JFA_VALUES_112(d) JFA_VALUES_96(d), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3])
#define JFA_VALUES_128(d) JFA_VALUES_112(d), "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
#define JFA_VALUES_144(d) JFA_VALUES_128(d), "+f"(d[16][0]), "+f"(d[16][1]), "+f"(d[16][2]), "+f"(d[16][3]), "+f"(d[17][0]), "+f"(d[17][1]), "+f"(d[17][2]), "+f"(d[17][3])
#define JFA_VALUES_160(d) JFA_VALUES_144(d), "+f"(d[18][0]), "+f"(d[18][1]), "+f"(d[18][2]), "+f"(d[18][3]), "+f"(d[19][0]), "+f"(d[19][1]), "+f"(d[19][2]), "+f"(d[19][3])
#define JFA_VALUES_176(d) JFA_VALUES_160(d), "+f"(d[20][0]), "+f"(d[20][1]), "+f"(d[20][2]), "+f"(d[20][3]), "+f"(d[21][0]), "+f"(d[21][1]), "+f"(d[21][2]), "+f"(d[21][3])
#define JFA_VALUES_192(d) JFA_VALUES_176(d), "+f"(d[22][0]), "+f"(d[22][1]), "+f"(d[22][2]), "+f"(d[22][3]), "+f"(d[23][0]), "+f"(d[23][1]), "+f"(d[23][2]), "+f"(d[23][3])
#define JFA_VALUES_208(d) JFA_VALUES_192(d), "+f"(d[24][0]), "+f"(d[24][1]), "+f"(d[24][2]), "+f"(d[24][3]), "+f"(d[25][0]), "+f"(d[25][1]), "+f"(d[25][2]), "+f"(d[25][3])
#define JFA_VALUES_224(d) JFA_VALUES_208(d), "+f"(d[26][0]), "+f"(d[26][1]), "+f"(d[26][2]), "+f"(d[26][3]), "+f"(d[27][0]), "+f"(d[27][1]), "+f"(d[27][2]), "+f"(d[27][3])
#define JFA_VALUES_240(d) JFA_VALUES_224(d), "+f"(d[28][0]), "+f"(d[28][1]), "+f"(d[28][2]), "+f"(d[28][3]), "+f"(d[29][0]), "+f"(d[29][1]), "+f"(d[29][2]), "+f"(d[29][3])
#define JFA_VALUES_256(d) JFA_VALUES_240(d), "+f"(d[30][0]), "+f"(d[30][1]), "+f"(d[30][2]), "+f"(d[30][3]), "+f"(d[31][0]), "+f"(d[31][1]), "+f"(d[31][2]), "+f"(d[31][3])
// clang-format on

// Wgmma<Element, kColumns>: the product of one width. `accumulate` is 0 to overwrite acc.
// kTransposed: rows of B's shared tile are rows of B, otherwise they are its columns.
template <class Element, int kColumns>
struct Wgmma;

#define JFA_WGMMA(ELEMENT, TYPE, COLUMNS, A0, A1, A2, A3, A4, A5, A6)                             \
  template <>                                                                                     \
  struct Wgmma<ELEMENT, COLUMNS> {                                                                \
    template <bool kTransposed>                                                                   \
    static __device__ __forceinline__ void multiply(float (&d)[COLUMNS / 8][4],                   \
                                                    unsigned long long a, unsigned long long b,   \
                                                    int accumulate) {                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2                                         \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE    \
                   " {" JFA_REGISTERS_##COLUMNS "}, " A0 ", " A1 ", p, 1, 1, 0, " A3 ";\n}\n"     \
                   : JFA_VALUES_##COLUMNS(d)                                                      \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed ? 1 : 0));                  \
    }                                                                                             \
    template <bool kTransposed>                                                                   \
    static __device__ __forceinline__ void multiply(float (&d)[COLUMNS / 8][4],                   \
                                                    const unsigned (&a)[4], unsigned long long b, \
                                                    int accumulate) {                             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A5                                         \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE    \
                   " {" JFA_REGISTERS_##COLUMNS "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " A4        \
                                                ", p, 1, 1, " A6 ";\n}\n"                         \
                   : JFA_VALUES_##COLUMNS(d)                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),         \
                     "n"(kTransposed ? 1 : 0));                                                   \
    }                                                                                             \
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
