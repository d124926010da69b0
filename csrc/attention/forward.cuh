// What both forward kernels do with 16 queries of a warp: scores, mask, softmax, product with V, results. Each function works on
// groups of BLOCKS x 16 keys; bit i of `visited` says whether block i takes part.
//
// Scores and probabilities never leave registers: the accumulator of Q K^T has the layout that P V wants of its left operand.
// Scores stay unscaled, softmax(c s) is taken as exp2(c s - c max s) with c = |scale| log2 e, one instruction beside ex2; q
// carries the sign of the scale. A hidden pair is selected to -inf, never added; a hidden key is read as 0, so what it holds (NaN
// too) reaches nothing. A query that sees no key: out 0, lse -inf.
#pragma once

#include "../common/tile.cuh"
#include "forward.h"
#include "forward_blocks.cuh"

#include <cmath>

namespace fastattn {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float INF = INFINITY;

// A scale of 0 would turn hidden scores into NaN: then q is read as 0 instead.
DEVICE float exponent_factor(float scale) { return scale == 0.0f ? 1.0f : fabsf(scale) * LOG2_E; }

// Q of the 16 rows at `tile` as A operands, times the sign of the scale.
template <int D>
DEVICE void load_queries(uint32_t (&q)[D / 16][4], const unsigned char* tile, float scale) {
  uint32_t keep = scale == 0.0f ? 0u : ~0u, flip = scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    load_a<D / 8>(q[k], tile, 0, k * 2);
#pragma unroll
    for (int i = 0; i < 4; i++) q[k][i] = (q[k][i] & keep) ^ flip;
  }
}

// The state of the softmax for the two rows (lane / 4, + 8) of which this thread holds a part.
template <int D>
struct Softmax {
  float out[D / 8][4];  // accumulator of P V
  float top[2];         // maximum of the scores, in this thread's columns until `share_top`
  float total[2];       // this thread's part of the sum of weights
};

template <int D>
DEVICE void clear(Softmax<D>& state) {
#pragma unroll
  for (int i = 0; i < D / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) state.out[i][e] = 0;
  state.top[0] = state.top[1] = -INF;
  state.total[0] = state.total[1] = 0;
}

// s += Q K^T for the keys of rows `row` on of k_tile. WHOLE: all blocks are visited, with 2 BLOCKS independent chains of
// products.
template <bool WHOLE, class T, int D, int BLOCKS>
DEVICE void multiply(float (*s)[4], const uint32_t (&q)[D / 16][4], const unsigned char* k_tile, int row, uint32_t visited) {
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
      if (WHOLE || (visited >> j & 1) != 0) {
        uint32_t b[4];
        load_b<D / 8>(b, k_tile, row + j * BLOCK, k * 2);
        mma_m16n8k16<T>(s[2 * j], q[k], {b[0], b[1]});
        mma_m16n8k16<T>(s[2 * j + 1], q[k], {b[2], b[3]});
      }
}

template <class T, int D, int BLOCKS>
DEVICE void scores(float (*s)[4], const uint32_t (&q)[D / 16][4], const unsigned char* k_tile, int row, uint32_t visited) {
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] = 0;
  if (visited == (1u << BLOCKS) - 1)
    multiply<true, T, D, BLOCKS>(s, q, k_tile, row, visited);
  else
    multiply<false, T, D, BLOCKS>(s, q, k_tile, row, visited);
}

// The mask's view of this thread's two rows: the keys that the bounds leave, and their documents.
struct MaskRows {
  int b, h, m;
  int end;  // of the live keys
  int first[2];
  unsigned count[2];
  int id[2];
};

DEVICE MaskRows mask_rows(const Mask& mask, const Bounds& r, int b, int h, int m) {
  MaskRows rows{b, h, m, r.end, {0, 0}, {0, 0}, {0, 0}};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = m + half * 8;
    if (!live_query(mask, r, b, row)) continue;
    rows.first[half] = first_key(mask, r, row);
    rows.count[half] = static_cast<unsigned>(max(last_key(mask, r, row) - rows.first[half], 0));
    if (mask.ids != nullptr) rows.id[half] = mask.ids[b * mask.ids_batch + row * mask.ids_query];
  }
  return rows;
}

// Bit 4 i + e: the pair that element e of the i-th accumulator belongs to is visible; i < 2, 16 keys from n0 on.
DEVICE uint32_t visible_pairs(const Mask& mask, const MaskRows& rows, int n0) {
  int column = threadIdx.x % 4 * 2;
  uint32_t pairs = 0;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      unsigned offset = static_cast<unsigned>(n0 + column + i * 8 + e % 2 - rows.first[e / 2]);
      pairs |= static_cast<uint32_t>(offset < rows.count[e / 2]) << (i * 4 + e);
    }
  if (mask.bits != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (rows.count[half] == 0) continue;
      const int32_t* words = mask.bits + rows.b * mask.bits_batch + rows.h * mask.bits_head + (rows.m + half * 8) * mask.bits_row;
      uint32_t word = static_cast<uint32_t>(words[n0 / 32 * mask.bits_word]) >> (n0 % 32 + column);
      uint32_t hidden = ~((word & 3) | (word >> 4 & 0x30)) & 0x33;
      pairs &= ~(hidden << (half * 2));
    }
  }
  if (mask.keys == nullptr && mask.ids == nullptr) return pairs;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int n = n0 + column + i * 8 + e;
      if (n >= rows.end) continue;
      if (mask.keys != nullptr && mask.keys[rows.b * mask.keys_batch + n * mask.keys_key] == 0) pairs &= ~(5u << (i * 4 + e));
      if (mask.ids == nullptr) continue;
      int id = mask.key_ids[rows.b * mask.key_ids_batch + n * mask.key_ids_key];
      if (id != rows.id[0]) pairs &= ~(1u << (i * 4 + e));
      if (id != rows.id[1]) pairs &= ~(4u << (i * 4 + e));
    }
  return pairs;
}

// The same for a tile of keys from n0 on, in byte j for block j; 0 for a block that is not visited. To be had before there are
// scores, which leave no registers for it.
DEVICE uint32_t tile_pairs(const Mask& mask, const MaskRows& rows, int n0, const Blocks& blocks) {
  uint32_t pairs = 0;
#pragma unroll 1
  for (int j = 0; j < TILE_BLOCKS; j++)
    if ((blocks.full >> j & 1) != 0)
      pairs |= 0xffu << (j * 8);
    else if ((blocks.visited >> j & 1) != 0)
      pairs |= visible_pairs(mask, rows, n0 + j * BLOCK) << (j * 8);
  return pairs;
}

// -inf where the bit of a pair is 0.
template <int BLOCKS>
DEVICE void hide(float (*s)[4], uint32_t pairs) {
  constexpr uint32_t ALL = 0xffffffffu >> (32 - 8 * BLOCKS);
  if ((pairs & ALL) == ALL) return;
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if ((pairs >> (i * 4 + e) & 1) == 0) s[i][e] = -INF;
}

// The maximum with TILES x 8 columns more.
template <int TILES, int D>
DEVICE void raise_top(Softmax<D>& state, const float (*s)[4]) {
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) state.top[half] = fmaxf(state.top[half], fmaxf(s[i][half * 2], s[i][half * 2 + 1]));
}

// The maximum of the whole rows, and what is subtracted in the exponent: 0 for a row that has seen no key.
template <int D>
DEVICE void share_top(float (&shift)[2], Softmax<D>& state, float factor) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float top = fmaxf(state.top[half], shuffle_xor(state.top[half], 1));
    state.top[half] = fmaxf(top, shuffle_xor(top, 2));
    shift[half] = state.top[half] == -INF ? 0.0f : state.top[half] * factor;
  }
}

// The weights of eight columns, rounded to T in the layout of half an A operand; their sum, not rounded, goes to the total.
template <class T, int D>
DEVICE void weigh(uint32_t (&weight)[2], Softmax<D>& state, const float (&s)[4], const float (&shift)[2], float factor) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float low = exp2_approximate(fmaf(s[half * 2], factor, -shift[half]));
    float high = exp2_approximate(fmaf(s[half * 2 + 1], factor, -shift[half]));
    state.total[half] += low + high;
    weight[half] = pack<T>(low, high);
  }
}

// out += P V. Each block's weights are made beside its product, so that few registers hold both scores and weights.
template <class T, int D, int BLOCKS>
DEVICE void accumulate(Softmax<D>& state, const float (*s)[4], const float (&shift)[2], float factor, const unsigned char* v_tile,
                       uint32_t visited) {
#pragma unroll
  for (int j = 0; j < BLOCKS; j++)
    if ((visited >> j & 1) != 0) {
      uint32_t low[2], high[2];
      weigh<T>(low, state, s[2 * j], shift, factor);
      weigh<T>(high, state, s[2 * j + 1], shift, factor);
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        uint32_t b[4];
        load_b_trans<D / 8>(b, v_tile, j * BLOCK, i * 2);
        mma_m16n8k16<T>(state.out[2 * i], {low[0], low[1], high[0], high[1]}, {b[0], b[1]});
        mma_m16n8k16<T>(state.out[2 * i + 1], {low[0], low[1], high[0], high[1]}, {b[2], b[3]});
      }
    }
}

// Divide by the sum of weights; write out and lse of the sequence's 16 rows from m0 on, dead from `rows` on. They go through
// `tile`, 16 x D of this warp's, for 16-byte stores.
template <class T, int D>
DEVICE void finish(const AttentionForward& p, const Softmax<D>& state, float factor, unsigned char* tile, int b, int h, int m0,
                   int rows) {
  int lane = threadIdx.x % 32;
  warp_barrier();  // what the tile held has been read by all lanes
  Span queries = span(p.mask.query_starts, b, p.M);
  float* lse = p.lse + b * p.lse_batch + h * p.lse_head + queries.first;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = half * 8 + lane / 4, m = m0 + row;
    float total = state.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    bool dead = m >= rows || total == 0.0f;
    float inverse = dead ? 0.0f : 1.0f / total;
    if (lane % 4 == 0 && m < queries.count) lse[m] = dead ? -INF : (state.top[half] * factor + log2f(total)) * LN_2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float low = dead ? 0.0f : state.out[i][half * 2] * inverse, high = dead ? 0.0f : state.out[i][half * 2 + 1] * inverse;
      *reinterpret_cast<uint32_t*>(tile + chunk_offset<D / 8>(row, i) + lane % 4 * 4) = pack<T>(low, high);
    }
  }
  warp_barrier();
  T* out = static_cast<T*>(p.out.data) + b * p.out.batch + h * p.out.head + queries.first * p.out.row;
#pragma unroll
  for (int i = 0; i < 16 * D / 8 / 32; i++) {
    int index = i * 32 + lane, row = index / (D / 8), chunk = index % (D / 8);
    if (m0 + row < queries.count)
      *reinterpret_cast<uint4*>(out + (m0 + row) * p.out.row + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + chunk_offset<D / 8>(row, chunk));
  }
}

}  // namespace fastattn
