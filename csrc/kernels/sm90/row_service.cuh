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
// The work is cut into pieces of up to 4 KB of shared memory, which the warps take in turn. No warp
// waits for another one, and each has the next piece on its way while it works on one. What binds
// them is in docs/tuning.md.
//
// With a key tile a CTA waits only for what comes with earlier ones, which have been taken by then,
// and whose CTAs do not wait for this one. The last groups have none to prepare for.
#pragma once

#include <attention/head_address.cuh>
#include <attention/row_statistics.cuh>
#include <params/backward_params.h>
#include <ptx/atomic.cuh>
#include <ptx/element.cuh>
#include <ptx/grid_dependency.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/special_register.cuh>
#include <ptx/tma.cuh>
#include <ptx/warpgroup.cuh>
#include <sm90/fused_place.cuh>
#include <sm90/load_tile.cuh>
#include <tile/bulk_accumulator.cuh>
#include <tile/fragment.cuh>
#include <tile/ring.cuh>
#include <tile/shared_tile.cuh>
#include <tile/write_rows.cuh>

namespace jfa::sm90 {

constexpr int kServiceWarps = 3;
constexpr int kServicePieceBytes = 4096;

// The share of a group's rows that goes with a key tile: pieces [begin, begin + count) of those of
// all its heads.
struct alignas(16) ServedPieces {
  int head;  // the group's first query head, of its batch
  int batch;
  int begin;
  int count;
};

// Shared memory of the service warps: two pieces for each, zeros, and what each has to do, since
// its loops leave no registers for that.
struct ServiceStaging {
  // Of a warp, which fills a stage itself when all its lanes are done with it: nobody waits for
  // empty ones.
  using Ring = tile::Ring<2>;
  using Position = tile::RingPosition<2>;
  static constexpr int kZerosOffset = kServiceWarps * 2 * kServicePieceBytes;
  static constexpr int kPiecesOffset = kZerosOffset + kServicePieceBytes;
  static constexpr int kRingsOffset =
      kPiecesOffset + kServiceWarps * 2 * static_cast<int>(sizeof(ServedPieces));
  static constexpr int kBytes = kRingsOffset + kServiceWarps * Ring::kBytes;

  // Threads: one, before a CTA barrier.
  static __device__ __forceinline__ void init(unsigned char* staging) {
    for (int warp = 0; warp < kServiceWarps; ++warp) ring(staging, warp).init(/*users=*/1);
  }
  // Threads: all of the CTA, before a CTA barrier.
  static __device__ __forceinline__ void clear(unsigned char* staging) {
    constexpr int kThreads = kServicePieceBytes / 16;
    if (threadIdx.x < kThreads)
      reinterpret_cast<uint4*>(staging + kZerosOffset)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    ptx::fence_async_proxy();  // the copy engine reads them
  }
  static __device__ __forceinline__ Ring ring(unsigned char* staging, int warp) {
    return {tile::shared_address(staging) + kRingsOffset + warp * Ring::kBytes};
  }
  // What a warp prepares, and what it rounds.
  static __device__ __forceinline__ ServedPieces* pieces(unsigned char* staging, int warp) {
    return reinterpret_cast<ServedPieces*>(staging + kPiecesOffset) + warp * 2;
  }
};

template <class Config, class Shapes>
struct RowService {
  // Rows of out and of dout, and zeros for their dq, whose rows are padded to columns of panels.
  static constexpr int kPreparedRows = Config::kPreparedRows;
  using Rows = tile::SharedTile<kPreparedRows, Config::kHeadDim>;
  static_assert(2 * Rows::kBytes == kServicePieceBytes, "out and dout");
  // dq sums of 16 rows, of columns that lie together.
  static constexpr int kRoundedParts = Shapes::kSplitsRows ? 1 : Shapes::kParts();
  static constexpr int kRoundedSteps =
      Shapes::kSplitsRows ? Shapes::kHeadDimSteps : Shapes::query_gradient_steps(0);
  static constexpr int kStepFloats = 16 * 16;
  static_assert(kRoundedSteps * kStepFloats * 4 <= kServicePieceBytes, "dq sums");

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
    ptx::await_flag(state_of(params.backward.prepared, group), tiles * kServiceWarps);
    ptx::fence_async_proxy_global();  // the copy engine reads what threads wrote
  }

  // Whether they are, where the kernel before has ended. Threads: one.
  __device__ __forceinline__ bool is_prepared() const {
    if (!Config::kServesRows || group < params.prepares_ahead) return true;
    if (ptx::load_acquire(state_of(params.backward.prepared, group)) < tiles * kServiceWarps)
      return false;
    ptx::fence_async_proxy_global();  // the copy engine reads what threads wrote
    return true;
  }

  // For the producer, behind its last addition with the key tile. Threads: one.
  __device__ __forceinline__ void tell_added() const {
    ptx::bulk_wait();  // also since shared memory ends with the CTA
    if constexpr (Config::kServesRows) {
      if (!is_rounded_by_others()) return;
      ptx::fence_async_proxy_global();  // threads read what the copy engine added
      ptx::await_previous_grid();       // which has cleared the counter
      ptx::add_release(state_of(params.backward.added, group), 1);
    }
  }

  // What goes with the key tile: its pieces to prepare, then those to round, dealt out among the
  // warps. `at` is the warp's next piece in its ring.
  // Threads: a service warp.
  __device__ __forceinline__ void serve(ServiceStaging::Position& at) const {
    if (ptx::elect_lane()) {
      pieces(kPrepared) = share(prepared_group(), prepares() ? prepared_pieces() : 0);
      pieces(kRounded) = share(rounded_group(), rounded_group() >= 0 ? rounded_pieces() : 0);
    }
    __syncwarp();  // all lanes read them
    // Pieces are counted from the first that is prepared.
    const auto prepared = [&] { return pieces(kPrepared).count; };
    const int count = prepared() + pieces(kRounded).count;

    // Two pieces are on their way before the first one is worked on.
    at.fills -= 2;
#pragma unroll 1
    for (int piece = service_warp() - 2 * kServiceWarps; piece < count; piece += kServiceWarps) {
      if (piece >= 0) {
        if (piece < prepared()) {
          prepare_rows(piece, at);
        } else {
          round_sums(piece - prepared(), at);
        }
        __syncwarp();  // all lanes have read it
      }
      // Behind the warp's last piece to prepare, which may be none, and before it waits for others.
      if (piece < prepared() && piece + kServiceWarps >= prepared()) tell_prepared();
      const int next = piece + 2 * kServiceWarps;
      if (next < count && ptx::elect_lane()) {
        const ServiceStaging::Position to{at.fills + 2};
        if (next < prepared()) {
          fetch_rows(next, to);
        } else {
          if (next < prepared() + kServiceWarps) await_added();  // before the warp's first one
          fetch_sums(next - prepared(), to);
        }
      }
      __syncwarp();
      at.advance();
    }
    __syncwarp();  // all lanes have read what there was to do
  }

 private:
  // Not by way of another lane: also called where one lane runs alone.
  static __device__ __forceinline__ int service_warp() { return ptx::reread_thread() / 32 - 1; }
  __device__ __forceinline__ ServiceStaging::Ring ring() const {
    return ServiceStaging::ring(staging, service_warp());
  }
  __device__ __forceinline__ unsigned char* staged(const ServiceStaging::Position& at) const {
    return staging + (service_warp() * 2 + at.stage()) * kServicePieceBytes;
  }
  __device__ __forceinline__ int* state_of(int* states, int of_group) const {
    return states + of_group * params.group_heads;
  }

  // Whether CTAs of this kernel wait for the group's additions.
  __device__ __forceinline__ bool is_rounded_by_others() const {
    const AttentionParams& attention = params.backward.attention;
    return group + params.rounds_behind < attention.batch * attention.heads_k;
  }

  static constexpr int kPrepared = 0;
  static constexpr int kRounded = 1;
  __device__ __forceinline__ ServedPieces& pieces(int which) const {
    return ServiceStaging::pieces(staging, service_warp())[which];
  }
  __device__ __forceinline__ int prepared_group() const { return group + params.prepares_ahead; }
  __device__ __forceinline__ int rounded_group() const { return group - params.rounds_behind; }
  // Pieces of a query head.
  __device__ __forceinline__ int prepared_pieces() const {
    return params.backward.padded_rows / kPreparedRows;
  }
  __device__ __forceinline__ int rounded_pieces() const {
    return (params.backward.attention.seqlen_q + 15) / 16 * kRoundedParts;
  }
  // Of a group of which there is something to do: under a causal mask the first key tiles have the
  // longest walks, the most time, and take the most: of the area of a triangle what lies before a
  // column. Otherwise all take the same.
  __device__ __forceinline__ ServedPieces share(int of_group, int head_pieces) const {
    const AttentionParams& attention = params.backward.attention;
    const bool causal = Config::kWindowed && attention.window_left >= attention.seqlen_k;
    const int count = head_pieces * params.group_heads;
    const auto before = [&](int cta) {
      // Approximate, but the same in both CTAs that ask.
      const float part = __fdividef(static_cast<float>(cta), static_cast<float>(tiles));
      return min(count, __float2int_rn(count * (causal ? part * (2.0f - part) : part)));
    };
    const int begin = before(tile);
    const int end = tile + 1 == tiles ? count : before(tile + 1);
    const int batch = of_group / attention.heads_k;
    // Of a million keys the rounding of `part` can put the end before the beginning.
    return {(of_group - batch * attention.heads_k) * params.group_heads, batch, begin,
            max(end - begin, 0)};
  }

  // One of the pieces that go with the key tile.
  struct Piece {
    int head;  // of its batch
    int batch;
    int place;  // among the head's
  };
  __device__ __forceinline__ Piece piece_of(const ServedPieces& served, int number,
                                            unsigned head_pieces) const {
    const unsigned of_group = served.begin + number;
    // A division takes longer than the rest of what is counted here.
    if (params.group_heads == 1) return {served.head, served.batch, static_cast<int>(of_group)};
    const unsigned head = of_group / head_pieces;
    return {served.head + static_cast<int>(head), served.batch,
            static_cast<int>(of_group - head * head_pieces)};
  }

  // Threads: one.
  __device__ __forceinline__ void await_added() const {
    ptx::await_previous_grid();  // which has cleared the counter
    ptx::await_flag(state_of(params.backward.added, rounded_group()), tiles);
    ptx::fence_async_proxy_global();  // the copy engine reads what others have heard of
  }
  __device__ __forceinline__ bool prepares() const {
    const AttentionParams& attention = params.backward.attention;
    return prepared_group() < attention.batch * attention.heads_k;
  }
  // Threads: a service warp that has written all that it prepares.
  __device__ __forceinline__ void tell_prepared() const {
    if (!prepares()) return;
    if (ptx::elect_lane()) {
      ptx::bulk_wait();  // its zeros are there
      // The copy engine adds to them, and reads what threads wrote.
      ptx::fence_async_proxy_global();
      ptx::await_previous_grid();  // which has cleared the counter
      ptx::add_release(state_of(params.backward.prepared, prepared_group()), 1);
    }
    __syncwarp();
  }

  // Threads: one, always the same of a warp.
  __device__ __forceinline__ void fetch_rows(int number, const ServiceStaging::Position& to) const {
    const BackwardParams& backward = params.backward;
    const Piece piece = piece_of(pieces(kPrepared), number, prepared_pieces());
    const int first_row = piece.place * kPreparedRows;
    ring().announce(to, 2 * Rows::kBytes);
    const auto fetch = [&](int offset, const TensorMap& map, const TensorView& view,
                           unsigned long long cache_policy) {
      load_tile<Rows>(tile::shared_address(staged(to)) + offset, map, ring().full(to.stage()),
                      cache_policy, first_row, piece.head,
                      attention::own_batch(piece.batch, view.batches));
    };
    fetch(0, params.out_rows, backward.out, ptx::kEvictFirst);
    fetch(Rows::kBytes, params.dout_rows, backward.dout, ptx::kEvictLast);
    const long long row = attention::workspace_row(backward, piece.batch, piece.head, first_row);
    ptx::bulk_store(backward.dq_accum + row * backward.padded_columns,
                    staging + ServiceStaging::kZerosOffset,
                    kPreparedRows * backward.padded_columns * static_cast<int>(sizeof(float)));
    ptx::bulk_commit();
  }

  // Blocks of eight rows, whose dot products are the diagonal of out dout^T: tensor cores work out
  // 64 products for 8 in a tenth of the instructions that these alone would take.
  __device__ __forceinline__ void prepare_rows(int number,
                                               const ServiceStaging::Position& at) const {
    constexpr int kBlocks = kPreparedRows / 8;
    const Piece piece = piece_of(pieces(kPrepared), number, prepared_pieces());
    const attention::RowStatistics statistics(params.backward, piece.batch, piece.head);
    const int lane = ptx::reread_lane();
    const int row = lane % kPreparedRows;
    const int query = piece.place * kPreparedRows + row;
    const attention::RowStatistics::Row known = statistics.load(query);

    ring().wait_full(at);
    const unsigned both = tile::shared_address(staged(at));
    float dot = 0.0f;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      float products[4] = {};
#pragma unroll
      for (int chunk = 0; chunk < Rows::kColumns / 8; chunk += 4) {
        // Matrices of 8 rows by 8 columns, side by side, each lane with a row of one.
        const unsigned place = both + Rows::offset(block * 8 + lane % 8, chunk + lane / 8);
        unsigned out[4];
        unsigned dout[4];
        ptx::ldmatrix_x4(out, place);
        ptx::ldmatrix_x4(dout, place + Rows::kBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // The other eight rows of the product's left side are zeros.
          const unsigned left[4] = {out[2 * half], 0, out[2 * half + 1], 0};
          Config::Element::mma(products, left, dout[2 * half], dout[2 * half + 1]);
        }
      }
      // Of row r of a block the diagonal lies with lane 4 r + r / 2 (tile/fragment.cuh).
      const float diagonal = __shfl_sync(0xffffffffu, lane / 4 % 2 ? products[1] : products[0],
                                         row % 8 * 4 + row % 8 / 2);
      if (row / 8 == block) dot = diagonal;
    }
    if (lane < kPreparedRows) statistics.store(query, known.lse_log2(), known.delta(dot));
  }

  struct RoundedBlock {
    int row_block;
    int first_step;
    int steps;
  };
  static __device__ __forceinline__ RoundedBlock rounded_block(int of_head) {
    const int part = of_head % kRoundedParts;
    return {of_head / kRoundedParts, part * Shapes::kSplitSteps,
            part == 0 ? kRoundedSteps : Shapes::query_gradient_steps(1)};
  }
  // Threads: one, always the same of a warp.
  __device__ __forceinline__ void fetch_sums(int number, const ServiceStaging::Position& to) const {
    constexpr int kTileBlocks = Config::kTileQ / 16;
    const BackwardParams& backward = params.backward;
    const Piece piece = piece_of(pieces(kRounded), number, rounded_pieces());
    const RoundedBlock block = rounded_block(piece.place);
    const long long tile_row = attention::workspace_row(
        backward, piece.batch, piece.head, block.row_block / kTileBlocks * Config::kTileQ);
    const int bytes = block.steps * kStepFloats * static_cast<int>(sizeof(float));
    ring().announce(to, bytes);
    ptx::bulk_load(
        tile::shared_address(staged(to)),
        backward.dq_accum + tile_row * backward.padded_columns +
            Shapes::query_gradient_place(block.row_block % kTileBlocks, block.first_step),
        bytes, ring().full(to.stage()));
  }
  __device__ __forceinline__ void round_sums(int number, const ServiceStaging::Position& at) const {
    const BackwardParams& backward = params.backward;
    const AttentionParams& attention = backward.attention;
    const Piece piece = piece_of(pieces(kRounded), number, rounded_pieces());
    const RoundedBlock block = rounded_block(piece.place);
    const int first_row = block.row_block * 16;
    const tile::RowWriter<typename Config::Element> writer(
        attention::head_address(backward.dq, piece.batch, piece.head) +
            static_cast<long long>(first_row) * backward.dq.row_stride + block.first_step * 16,
        backward.dq.row_stride, attention.seqlen_q - first_row);
    const float* const sums = reinterpret_cast<const float*>(staged(at)) + ptx::reread_lane() * 4;
    bool finite = true;
    ring().wait_full(at);
    // Parts that differ take registers.
    constexpr bool kEven = kRoundedParts == 1 || kRoundedSteps == Shapes::query_gradient_steps(1);
#pragma unroll(kEven ? 2 : 1)
    for (int step = 0; step < block.steps; ++step) {
      tile::Accumulator<1, 1> dq;
      tile::read_sums(dq, sums + step * kStepFloats);
      dq.scale(attention.softmax_scale);
      if constexpr (Config::kWindowed) finite &= dq.is_finite();
      writer.write(dq.values[0][0], dq.values[0][1], step * 16,
                   (block.first_step + step + 1) * 16 <= Config::kHeadDim);
    }
    // As far as that matters.
    if (!finite) backward.dq_spoilt[piece.batch * attention.heads + piece.head] = 1;
  }
};

}  // namespace jfa::sm90
