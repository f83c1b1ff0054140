// What the three warps beside the producer of the fused backward do for other heads while the
// products run, so that no kernel before and none behind has to do it for all of them:
//
//   prepare  what a group's key tiles start from: zeros for dq, and statistics of the query rows
//   round    the dq sums of a group that all its key tiles have added to, to 16 bits
//
// A group is a key head with the query heads that read it. Its key tiles follow each other but for
// the last groups' (sm90/fused_place.cuh), and a share of this work goes with each, by the time
// that it takes: with them come rows of the group `prepares_ahead` on, and of the one
// `rounds_behind` back, which lie in L2. The first groups find their rows prepared by the
// kernel before, and the kernel behind rounds what is left.
//
// With a key tile a CTA waits only for what comes with earlier ones, which have been taken by then,
// and whose CTAs do not wait for this one. The last groups have none to prepare for.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_preparation.cuh>
#include <params/backward_params.h>
#include <ptx/atomic.cuh>
#include <ptx/grid_dependency.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/fused_place.cuh>
#include <sm90/load_tile.cuh>
#include <tile/bulk_accumulator.cuh>
#include <tile/fragment.cuh>
#include <tile/shared_tile.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

constexpr int kServiceWarps = 3;
constexpr int kServiceThreads = kServiceWarps * 32;
constexpr int kServiceBarrier = 3;
constexpr int kServiceStagingBytes = 32 * 1024;

// A number for each service warp, in shared memory: its loops leave no register.
struct ServiceCounts {
  static constexpr int kBytes = kServiceWarps * static_cast<int>(sizeof(unsigned));
  volatile unsigned* counts;

  __device__ __forceinline__ explicit ServiceCounts(unsigned char* memory)
      : counts(reinterpret_cast<volatile unsigned*>(memory)) {}

  // Threads: one, before a CTA barrier.
  __device__ __forceinline__ void init() const {
    for (int warp = 0; warp < kServiceWarps; ++warp) counts[warp] = 0;
  }
  __device__ __forceinline__ volatile unsigned& of(int service_warp) const {
    return counts[service_warp];
  }
  // Threads: a whole warp, with its own.
  static __device__ __forceinline__ void advance(volatile unsigned& count) {
    __syncwarp();  // all lanes have read it
    if (ptx::elect_lane()) count = count + 1;
    __syncwarp();
  }
};

// Shared memory of the service warps: rows of out and of dout and their products, or the dq sums of
// a query tile.
template <class QueryTile>
struct ServiceStaging {
  // The columns behind the last are zeros in both.
  using Dots = attention::RowDots<QueryTile::kPanels * 8, kServiceThreads>;
  static constexpr int kRows = QueryTile::kRows;
  static_assert(kWorkspaceRowMultiple % kRows == 0, "a block is staged in whole parts");
  static constexpr int kRowsPerThread = (kRows + kServiceThreads - 1) / kServiceThreads;
  // Whole warps run each pass.
  static constexpr int kRowsOfPasses =
      (kRows + Dots::kRowsPerPass - 1) / Dots::kRowsPerPass * Dots::kRowsPerPass;
  static constexpr int kSumsOffset = kServiceStagingBytes;
  static constexpr int kFetchOffset = kSumsOffset + kRows * static_cast<int>(sizeof(float));
  static constexpr int kFetchesOffset = kFetchOffset + 8;  // behind a barrier
  static constexpr int kBytes = (kFetchesOffset + ServiceCounts::kBytes + 15) / 16 * 16;
  static_assert(2 * QueryTile::kBytes <= kServiceStagingBytes, "out and dout of a query tile");

  // Threads: one, before a CTA barrier.
  static __device__ __forceinline__ void init(unsigned char* staging) {
    ptx::mbarrier_init(tile::shared_address(staging) + kFetchOffset, 1);
    fetches(staging).init();
  }
  // How many fetches a warp has awaited.
  static __device__ __forceinline__ ServiceCounts fetches(unsigned char* staging) {
    return ServiceCounts(staging + kFetchesOffset);
  }
};

// The share of [0, count) that goes with a key tile.
struct ServiceShare {
  int begin;
  int end;
};

template <class Config, class Shapes>
struct RowService {
  using QueryTile = typename Shapes::QueryTile;
  using Staging = ServiceStaging<QueryTile>;
  static_assert(Shapes::kQueryGradientBytes <= kServiceStagingBytes, "dq sums of a query tile");
  const Sm90FusedBackwardParams& params;
  unsigned char* staging;
  int tiles;  // key tiles of a group
  int tile;   // the one that this goes with
  int group;  // counted through the whole batch

  __device__ __forceinline__ RowService(const Sm90FusedBackwardParams& fused, unsigned char* shared,
                                        const attention::TilePlace& place)
      : params(fused),
        staging(shared + Shapes::kServiceOffset),
        tiles(group_key_tiles<Config>(fused)),
        tile(place.tile),
        group(place.batch * fused.backward.attention.heads_k + place.head) {}

  // For the producer: until the rows of the key tile's group are prepared. Threads: one.
  __device__ __forceinline__ void await_prepared() const {
    ptx::await_previous_grid();
    if (!Config::kServesRows || group < params.prepares_ahead) return;
    ptx::await_flag(state_of(params.backward.prepared, group), tiles);
    ptx::fence_async_proxy_global();  // the copy engine reads what threads wrote
  }

  // Whether they are, where the kernel before has ended. Threads: one.
  __device__ __forceinline__ bool is_prepared() const {
    if (!Config::kServesRows || group < params.prepares_ahead) return true;
    if (ptx::load_acquire(state_of(params.backward.prepared, group)) < tiles) return false;
    ptx::fence_async_proxy_global();  // the copy engine reads what threads wrote
    return true;
  }

  // For the producer, behind its last addition with the key tile. Threads: one.
  __device__ __forceinline__ void tell_added() const {
    ptx::bulk_wait();  // also since shared memory ends with the CTA
    if constexpr (Config::kServesRows) {
      ptx::fence_async_proxy_global();  // threads read what the copy engine added
      ptx::await_previous_grid();       // which has cleared the counter
      ptx::add_release(state_of(params.backward.added, group), 1);
    }
  }

  // Threads: the service warps, also of the next ones.
  __device__ __forceinline__ void prepare() const {
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
      // The thread is read anew each time, or what follows from it would stay in registers.
#pragma unroll 1
      for (int row = 0; row < kWorkspaceRowMultiple; row += Staging::kRows)
        prepare_rows(batch, head % attention.heads, block * kWorkspaceRowMultiple + row,
                     service_thread(), [&] {
                       // While rows are on their way.
                       if (row == 0)
                         attention::clear_sums<kServiceThreads>(
                             backward, batch, head % attention.heads, block, service_thread());
                     });
    }
  }

  __device__ __forceinline__ void tell_prepared() const {
    const AttentionParams& attention = params.backward.attention;
    const int target = group + params.prepares_ahead;
    if (target >= attention.batch * attention.heads_k) return;
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // all have written
    // By the last warp: the first one asks for what there is to round meanwhile.
    if (service_thread() == kServiceThreads - 32) {
      ptx::fence_async_proxy_global();  // the copy engine adds to what threads wrote
      ptx::await_previous_grid();       // which has cleared the counter
      ptx::add_release(state_of(params.backward.prepared, target), 1);
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
      ptx::fence_async_proxy_global();  // the copy engine reads what others have heard of
    }
#pragma unroll 1
    for (int i = query_tiles.begin; i < query_tiles.end; ++i)
      if (!round_tile(target * group_heads() + i / head_tiles, i % head_tiles, thread))
        backward.dq_spoilt[target * group_heads() + i / head_tiles] = 1;
  }

 private:
  __device__ __forceinline__ unsigned fetch_barrier() const {
    return tile::shared_address(staging) + Staging::kFetchOffset;
  }
  // Until what has been fetched last is there. Threads: the service warps.
  __device__ __forceinline__ void await_fetch() const {
    volatile unsigned& fetches = Staging::fetches(staging).of(ptx::uniform(service_thread() / 32));
    ptx::mbarrier_wait(fetch_barrier(), fetches % 2);
    ServiceCounts::advance(fetches);
  }
  static __device__ __forceinline__ int service_thread() { return ptx::reread_thread() - 32; }
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
  template <class Meanwhile>
  __device__ __forceinline__ void prepare_rows(int batch, int head, int first_row, int thread,
                                               Meanwhile meanwhile) const {
    using Dots = typename Staging::Dots;
    const BackwardParams& backward = params.backward;
    ptx::barrier_sync(kServiceBarrier, kServiceThreads);  // all have read what was staged before
    if (thread == 0) {
      ptx::mbarrier_arrive_expect(fetch_barrier(), 2 * QueryTile::kBytes);
      const auto fetch = [&](int offset, const TensorMap& map, const TensorView& view,
                             unsigned long long cache_policy) {
        load_tile<QueryTile>(tile::shared_address(staging) + offset, map, fetch_barrier(),
                             cache_policy, first_row, head,
                             attention::own_batch(batch, view.batches));
      };
      fetch(0, params.out, backward.out, ptx::kEvictFirst);
      fetch(QueryTile::kBytes, params.dout, backward.dout, ptx::kEvictLast);
    }
    meanwhile();
    const attention::RowStatistics statistics(backward, batch, head);
    attention::RowStatistics::Row known[Staging::kRowsPerThread];
#pragma unroll
    for (int i = 0; i < Staging::kRowsPerThread; ++i)
      known[i] = statistics.load(first_row + i * kServiceThreads + thread);
    await_fetch();

    float* const sums = reinterpret_cast<float*>(staging + Staging::kSumsOffset);
    const int chunk = Dots::read_chunk(thread);
#pragma unroll 2
    for (int row = thread / Dots::kThreadsPerRow; row < Staging::kRowsOfPasses;
         row += Dots::kRowsPerPass) {
      // In which order a row's chunks lie is the same in both.
      const unsigned char* const lies = staging + chunk / 8 * QueryTile::kPanelBytes +
                                        min(row, Staging::kRows - 1) * tile::kPanelRowBytes +
                                        chunk % 8 * 16;
      const float dot = attention::dot_chunk<typename Config::Element>(
          reinterpret_cast<const unsigned short*>(lies),
          reinterpret_cast<const unsigned short*>(lies + QueryTile::kBytes));
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
    if (thread == 0) {
      ptx::mbarrier_arrive_expect(fetch_barrier(), Shapes::kQueryGradientBytes);
      ptx::bulk_load(tile::shared_address(staging), sums, Shapes::kQueryGradientBytes,
                     fetch_barrier());
    }
    await_fetch();

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
