// What the three warps beside the producer of the fused backward do for other heads while the
// products run, so that no kernel before and none behind has to do it for all of them:
//
//   prepare  what a group's CTAs start from: zeros for dq, and statistics of the query rows
//   round    the dq sums of a group that all its CTAs have added to, to 16 bits
//
// A group is a key head with the query heads that read it. The CTAs of a group, one for each key
// tile, follow each other in the grid but for the last groups' (sm90/fused_place.cuh), and share
// this work by the time they have: they prepare for the group `prepares_ahead` on and round for the
// one `rounds_behind` back, which they find in L2. Those of the first groups find their rows
// prepared by the kernel before, and the kernel behind rounds what is left.
//
// A CTA waits only for CTAs with smaller block indices, which the hardware starts first, so it
// never waits for one that can't run. The last groups have none to prepare for.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_preparation.cuh>
#include <params/backward_params.h>
#include <ptx/atomic.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/grid_dependency.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/fused_place.cuh>
#include <tile/bulk_accumulator.cuh>
#include <tile/fragment.cuh>
#include <tile/shared_tile.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

constexpr int kServiceWarps = 3;
constexpr int kServiceThreads = kServiceWarps * 32;
constexpr int kServiceBarrier = 3;
constexpr int kServiceStagingBytes = 32 * 1024;

// Shared memory of the service warps: rows of out and of dout and their products, or the dq sums of
// a query tile.
template <class Config, class Shapes>
struct ServiceStaging {
  using Dots = attention::RowDots<Config, kServiceThreads>;
  static constexpr int kRowBytes = Config::kHeadDim * 2;
  static constexpr int kRows = Config::kHeadDim > 64 ? 64 : 128;
  static_assert(kWorkspaceRowMultiple % kRows == 0, "a block is staged in whole parts");
  static constexpr int kRowsPerThread = (kRows + kServiceThreads - 1) / kServiceThreads;
  // Whole warps run each pass.
  static constexpr int kRowsOfPasses =
      (kRows + Dots::kRowsPerPass - 1) / Dots::kRowsPerPass * Dots::kRowsPerPass;
  static constexpr int kRowsBytes = 2 * kRows * kRowBytes;
  static constexpr int kSumsOffset = kServiceStagingBytes;
  static constexpr int kBytes = kSumsOffset + kRows * static_cast<int>(sizeof(float));
  static_assert(kRowsBytes <= kServiceStagingBytes &&
                    Shapes::kQueryGradientBytes <= kServiceStagingBytes,
                "what is staged at a time");
};

// A CTA's share of [0, count).
struct ServiceShare {
  int begin;
  int end;
};

template <class Config, class Shapes>
struct RowService {
  using Staging = ServiceStaging<Config, Shapes>;
  const Sm90FusedBackwardParams& params;
  unsigned char* staging;
  int tiles;  // CTAs of a group
  int tile;   // this one among them
  int group;  // counted through the whole batch

  __device__ __forceinline__ RowService(const Sm90FusedBackwardParams& fused, unsigned char* shared)
      : params(fused),
        staging(shared + Shapes::kServiceOffset),
        tiles((fused.backward.attention.seqlen_k + Config::kTileK - 1) / Config::kTileK) {
    const attention::TilePlace place = fused_place<Config>(fused);
    tile = place.tile;
    group = place.batch * fused.backward.attention.heads_k + place.head;
  }

  // For the producer: until the rows of the own group are prepared. Threads: one.
  __device__ __forceinline__ void await_prepared() const {
    ptx::await_previous_grid();
    if (!Config::kServesRows || group < params.prepares_ahead) return;
    ptx::await_flag(state_of(params.backward.prepared, group), tiles);
    ptx::fence_async_proxy_global();  // the copy engine reads what threads wrote
  }

  // For the producer, behind its last addition. Threads: one.
  __device__ __forceinline__ void tell_added() const {
    ptx::bulk_wait();  // also since shared memory ends with the CTA
    if constexpr (Config::kServesRows) {
      ptx::fence_async_proxy_global();  // threads read what the copy engine added
      ptx::await_previous_grid();       // which has cleared the counter
      ptx::add_release(state_of(params.backward.added, group), 1);
    }
  }

  // Threads: the service warps, also of the next.
  __device__ __forceinline__ void prepare() const {
    const int thread = service_thread();
    const BackwardParams& backward = params.backward;
    const AttentionParams& attention = backward.attention;
    const int target = group + params.prepares_ahead;
    if (target >= attention.batch * attention.heads_k) return;
    const int head_blocks = backward.padded_rows / kWorkspaceRowMultiple;
    const ServiceShare blocks = share(head_blocks * group_heads());
#pragma unroll 1
    for (int i = blocks.begin; i < blocks.end; ++i) {
      const int head = target * group_heads() + i / head_blocks;
      const int batch = head / attention.heads;
      const int block = i % head_blocks;
      attention::clear_sums<kServiceThreads>(backward, batch, head % attention.heads, block,
                                             thread);
#pragma unroll 1
      for (int row = 0; row < kWorkspaceRowMultiple; row += Staging::kRows)
        prepare_rows(batch, head % attention.heads, block * kWorkspaceRowMultiple + row, thread);
    }
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // all have written
    if (thread == 0) {
      ptx::fence_async_proxy_global();  // the copy engine adds to what threads wrote
      ptx::await_previous_grid();       // which has cleared the counter
      ptx::add_release(state_of(backward.prepared, target), 1);
    }
  }

  __device__ __forceinline__ void round() const {
    const int thread = service_thread();
    const BackwardParams& backward = params.backward;
    const int target = group - params.rounds_behind;
    if (target < 0) return;
    const int head_tiles = (backward.attention.seqlen_q + Config::kTileQ - 1) / Config::kTileQ;
    const ServiceShare query_tiles = share(head_tiles * group_heads());
    if (query_tiles.begin == query_tiles.end) return;
    if (thread == 0) {
      ptx::await_previous_grid();  // which has cleared the counter
      ptx::await_flag(state_of(backward.added, target), tiles);
    }
#pragma unroll 1
    for (int i = query_tiles.begin; i < query_tiles.end; ++i)
      if (!round_tile(target * group_heads() + i / head_tiles, i % head_tiles, thread))
        backward.dq_spoilt[target * group_heads() + i / head_tiles] = 1;
  }

 private:
  static __device__ __forceinline__ int service_thread() {
    return static_cast<int>(threadIdx.x) - 32;
  }
  __device__ __forceinline__ int group_heads() const {
    const AttentionParams& attention = params.backward.attention;
    return attention.heads / attention.heads_k;
  }
  __device__ __forceinline__ int* state_of(int* states, int of_group) const {
    return states + of_group * group_heads();
  }
  // Under a causal mask the first key tiles have the longest walks, the most time, and take the
  // most: of the area of a triangle what lies before a column. Otherwise all take the same.
  __device__ __forceinline__ ServiceShare share(int count) const {
    const AttentionParams& attention = params.backward.attention;
    const bool causal = Config::kWindowed && attention.window_left >= attention.seqlen_k;
    const auto before = [&](int cta) {
      // Approximate, but the same in both CTAs that ask.
      const float part = __fdividef(static_cast<float>(cta), static_cast<float>(tiles));
      return min(count, __float2int_rn(count * (causal ? part * (2.0f - part) : part)));
    };
    return {before(tile), tile + 1 == tiles ? count : before(tile + 1)};
  }

  // Staging::kRows of them, by way of shared memory: registers for so many reads there are none.
  __device__ __forceinline__ void prepare_rows(int batch, int head, int first_row,
                                               int thread) const {
    using Dots = typename Staging::Dots;
    const BackwardParams& backward = params.backward;
    const auto stage = [&](const TensorView& view, int offset) {
      const unsigned short* const rows =
          attention::head_address(view, batch, head) + thread % Dots::kThreadsPerRow * 8;
      if (thread % Dots::kThreadsPerRow >= Dots::kChunks) return;
#pragma unroll 2
      for (int row = thread / Dots::kThreadsPerRow; row < Staging::kRows;
           row += Dots::kRowsPerPass) {
        const int read_row = first_row + row;
        ptx::cp_async_16(tile::shared_address(staging) + offset + row * Staging::kRowBytes +
                             thread % Dots::kThreadsPerRow * 16,
                         rows + static_cast<long long>(read_row) * view.row_stride,
                         read_row < backward.attention.seqlen_q);
      }
    };
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // all have read what was staged before
    stage(backward.out, 0);
    stage(backward.dout, Staging::kRows * Staging::kRowBytes);
    ptx::cp_async_commit();
    const attention::RowStatistics statistics(backward, batch, head);
    attention::RowStatistics::Row known[Staging::kRowsPerThread];
#pragma unroll
    for (int i = 0; i < Staging::kRowsPerThread; ++i)
      known[i] = statistics.load(first_row + i * kServiceThreads + thread);
    ptx::cp_async_wait<0>();
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // out and dout are there

    float* const sums = reinterpret_cast<float*>(staging + Staging::kSumsOffset);
#pragma unroll 2
    for (int row = thread / Dots::kThreadsPerRow; row < Staging::kRowsOfPasses;
         row += Dots::kRowsPerPass) {
      const unsigned char* const chunk = staging +
                                         min(row, Staging::kRows - 1) * Staging::kRowBytes +
                                         Dots::read_chunk(thread) * 16;
      const float dot = attention::dot_chunk<typename Config::Element>(
          reinterpret_cast<const unsigned short*>(chunk),
          reinterpret_cast<const unsigned short*>(chunk + Staging::kRows * Staging::kRowBytes));
      const float sum = Dots::join(dot, thread);
      if (thread % Dots::kThreadsPerRow == 0 && row < Staging::kRows) sums[row] = sum;
    }
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // sums are there
#pragma unroll
    for (int i = 0; i < Staging::kRowsPerThread; ++i) {
      const int row = i * kServiceThreads + thread;
      if (row < Staging::kRows)
        statistics.store(first_row + row, known[i].lse_log2(), known[i].delta(sums[row]));
    }
  }

  // dq of a query tile of a head, which is counted through the whole batch. Returns whether what
  // this thread has of it is finite, as far as that matters.
  __device__ __forceinline__ bool round_tile(int head, int query_tile, int thread) const {
    const BackwardParams& backward = params.backward;
    const AttentionParams& attention = backward.attention;
    const int first_tile_row = query_tile * Config::kTileQ;
    const float* const sums =
        backward.dq_accum + (static_cast<long long>(head) * backward.padded_rows + first_tile_row) *
                                backward.padded_columns;
    // The target's key tiles have added, and all have read what was staged before.
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);
#pragma unroll 2
    for (int i = thread; i < Shapes::kQueryGradientBytes / 16; i += kServiceThreads)
      ptx::cp_async_16(tile::shared_address(staging) + i * 16, sums + i * 4, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // the sums are there

    unsigned short* const dq =
        attention::head_address(backward.dq, head / attention.heads, head % attention.heads);
    bool finite = true;
#pragma unroll 1
    for (int piece = ptx::uniform(thread / 32); piece < Config::kTileQ / 16 * Shapes::kHeadDimSteps;
         piece += kServiceWarps)
      finite &= round_piece(dq, first_tile_row, piece / Shapes::kHeadDimSteps,
                            piece % Shapes::kHeadDimSteps);
    return finite;
  }

  // 16 rows by 16 columns of it, and likewise. Threads: a whole warp.
  __device__ __forceinline__ bool round_piece(unsigned short* dq, int first_tile_row, int row_block,
                                              int step) const {
    const int row_stride = params.backward.dq.row_stride;
    const AttentionParams& attention = params.backward.attention;
    tile::Accumulator<1, 1> part;
    tile::read_sums(part, reinterpret_cast<const float*>(staging) +
                              Shapes::query_gradient_place(row_block, step) +
                              ptx::reread_lane() * 4);
    part.scale(attention.softmax_scale);
    const int first_row = first_tile_row + row_block * 16;
    unsigned short* const target = dq + static_cast<long long>(first_row) * row_stride + step * 16;
    const int rows = attention.seqlen_q - first_row;
    if (Config::kHeadDim % 16 == 0 || step + 1 < Shapes::kHeadDimSteps) {
      tile::write_rows<typename Config::Element, 16>(target, row_stride, rows, part);
    } else {
      tile::write_rows<typename Config::Element, 8>(target, row_stride, rows, part);
    }
    return !Config::kWindowed || part.is_finite();
  }
};

}  // namespace jfa::sm90
