// What the backward kernels share: P and dS of 16 queries, their products with dO and Q, rows that see no key, the store of a
// gradient.
//
// With P = exp(S - lse), delta = rowsum(dO * O) - dlse: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T
// Q. Scores are query-major. A warp works on 16 queries at a time, a row of which is held by four of its lanes.
#pragma once

#include "../common/tile.cuh"
#include "backward.h"
#include "mask.cuh"

#include <cmath>

namespace fastattn {

constexpr int BLOCK_Q = 32;  // queries of a stage, where a kernel walks over queries
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float INF = INFINITY;

enum Kind { EMPTY, PARTIAL, FULL };

// What the lists say of a tile; without lists a tile is FULL as far as they go, unless `keys` may punch holes into it.
DEVICE Kind listed(const Mask& mask, int b, int h, int query_tile, int key_tile) {
  const TileLists& lists = mask.key_tiles;
  if (lists.data == nullptr) return mask.keys == nullptr ? FULL : PARTIAL;
  const int32_t* list = lists.data + b * lists.batch + h * lists.head + query_tile * lists.row;
  for (int i = 0; i < list[0] + list[1]; i++)
    if (list[2 + i] == key_tile) return i < list[0] ? PARTIAL : FULL;
  return EMPTY;
}

// How much is visible of the 16 queries from m0 on and the KEYS keys from n0 on, inside a tile of which `listed` is known.
template <int KEYS>
DEVICE Kind kind(const Mask& mask, const Bounds& r, int m0, int n0, Kind listed) {
  if (listed == EMPTY || m0 >= r.rows) return EMPTY;
  Run run = key_run(mask, r, m0, min(m0 + 16, r.rows) - 1);
  if (max(n0, run.first) >= min(n0 + KEYS, run.last)) return EMPTY;
  return n0 >= run.full_first && n0 + KEYS <= run.full_last ? listed : PARTIAL;
}

// The tiles of STEP queries or keys to visit: those of a list, or the run from first to last.
template <int STEP>
struct Visits {
  static constexpr int PER_TILE = MASK_TILE / STEP;
  const int32_t* list;
  int first, count;

  DEVICE int start(int i) const {
    return list == nullptr ? first + i * STEP : list[2 + i / PER_TILE] * MASK_TILE + i % PER_TILE * STEP;
  }
  DEVICE Kind listed(int i, const Mask& mask) const {
    if (list == nullptr) return mask.keys == nullptr ? FULL : PARTIAL;
    return i / PER_TILE < list[0] ? PARTIAL : FULL;
  }
};

template <int STEP>
DEVICE Visits<STEP> visits(const TileLists& lists, int b, int h, int tile, int first, int last) {
  if (lists.data == nullptr) {
    first = first / STEP * STEP;
    return {nullptr, first, max(last - first + STEP - 1, 0) / STEP};
  }
  const int32_t* list = lists.data + b * lists.batch + h * lists.head + tile * lists.row;
  return {list, 0, (list[0] + list[1]) * Visits<STEP>::PER_TILE};
}

// 16 queries in shared memory. `shift` is lse in units of log 2, or +inf where a query sees no key; `delta` is 0 there.
struct Queries {
  const unsigned char *q, *dout;  // tiles of 16 x D
  const float *shift, *delta;
};

// sum(x * y) over the 8 elements of a chunk.
template <class T>
DEVICE float chunk_product(const uint4& x, const uint4& y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    sum += to_float(T{static_cast<uint16_t>(a[i])}) * to_float(T{static_cast<uint16_t>(b[i])});
    sum += to_float(T{static_cast<uint16_t>(a[i] >> 16)}) * to_float(T{static_cast<uint16_t>(b[i] >> 16)});
  }
  return sum;
}

// Shift and delta of the rows of a tile, and zeros for what q and dO hold in rows that see no key. A warp takes 256 / D rows at
// `first`, the next at first + step, and so on below `rows`. Lane i holds of row i the lse (-inf beyond the last query), and dlse
// if there is `out` to make delta from, or delta itself.
template <class T, int D>
DEVICE void prepare(unsigned char* q, unsigned char* dout, const unsigned char* out, float* shift, float* delta, float lse,
                    float given, int first, int step, int rows) {
  constexpr int LANES = D / 8;  // of a row
  int lane = threadIdx.x % 32, chunk = lane % LANES;
  for (int row0 = first; row0 < rows; row0 += step) {
    int row = row0 + lane / LANES, place = chunk_offset<LANES>(row, chunk);
    float row_lse = shuffle(lse, row), row_delta = shuffle(given, row);
    bool dead = row_lse == -INF;
    if (out != nullptr) {
      float sum = chunk_product<T>(*reinterpret_cast<uint4*>(dout + place), *reinterpret_cast<const uint4*>(out + place));
#pragma unroll
      for (int i = 1; i < LANES; i *= 2) sum += shuffle_xor(sum, i);
      row_delta = sum - row_delta;
    }
    if (dead) *reinterpret_cast<uint4*>(q + place) = *reinterpret_cast<uint4*>(dout + place) = uint4{0, 0, 0, 0};
    if (chunk == 0) {
      shift[row] = dead ? INF : row_lse * LOG2_E;
      delta[row] = dead ? 0.0f : row_delta;
    }
  }
}

// s = A B^T: 16 rows of A and KEYS of B, of which the first `blocks` times 16 exist.
template <class T, int D, int KEYS>
DEVICE void scores(float (&s)[KEYS / 8][4], const unsigned char* a_tile, const unsigned char* b_tile, int blocks) {
#pragma unroll
  for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[4];
    load_a<D / 8>(a, a_tile, 0, k * 2);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
      if (j < blocks) {
        uint32_t b[4];
        load_b<D / 8>(b, b_tile, j * 16, k * 2);
        mma_m16n8k16<T>(s[2 * j], a, {b[0], b[1]});
        mma_m16n8k16<T>(s[2 * j + 1], a, {b[2], b[3]});
      }
  }
}

// 0 where the mask hides the pair of key n0 + column and query m0 + row.
template <int KEYS>
DEVICE void hide(float (&p)[KEYS / 8][4], const Mask& mask, const Bounds& r, int b, int h, int m0, int n0) {
  int m = m0 + threadIdx.x % 32 / 4, column = n0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int n = column + i * 8 + e;
      bool live = live_key(mask, r, b, n);
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (!live || m + half * 8 >= r.rows || !visible(mask, r, b, h, m + half * 8, n)) p[i][half * 2 + e] = 0;
    }
}

// P and dS of 16 queries and KEYS keys, in fp32. The caller's `hide_pairs` sets P to 0 where a pair is hidden.
template <class T, int D, int KEYS, class Hide>
DEVICE void weights(float (&p)[KEYS / 8][4], float (&ds)[KEYS / 8][4], const Queries& x, const unsigned char* k_tile,
                    const unsigned char* v_tile, int blocks, float scale, Hide hide_pairs) {
  int row = threadIdx.x % 32 / 4;
  scores<T, D, KEYS>(p, x.q, k_tile, blocks);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float shift = x.shift[row + half * 8];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) p[i][half * 2 + e] = exp2_approximate(p[i][half * 2 + e] * (scale * LOG2_E) - shift);
  }
  hide_pairs(p);
  scores<T, D, KEYS>(ds, x.dout, v_tile, blocks);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float delta = x.delta[row + half * 8];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) ds[i][half * 2 + e] = p[i][half * 2 + e] * (ds[i][half * 2 + e] - delta);
  }
}

// The gradients of KEYS keys, in the accumulators of one warp.
template <int D, int KEYS>
struct Slab {
  float dk[KEYS / 16][D / 8][4], dv[KEYS / 16][D / 8][4];

  DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
      for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) dk[j][i][e] = dv[j][i][e] = 0;
  }
};

// Rounded to T, into a tile of 16 x KEYS.
template <class T, int KEYS>
DEVICE void store_fragments(unsigned char* tile, const float (&x)[KEYS / 8][4]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<uint32_t*>(tile + chunk_offset<KEYS / 8>(half * 8 + lane / 4, i) + lane % 4 * 4) =
          pack<T>(x[i][half * 2], x[i][half * 2 + 1]);
}

// gradient += weight^T rows: a tile of 16 queries x KEYS, and one of 16 queries x D.
template <class T, int D, int KEYS>
DEVICE void accumulate(float (&gradient)[KEYS / 16][D / 8][4], const unsigned char* weight, const unsigned char* rows,
                       int blocks) {
  uint32_t a[KEYS / 16][4];
#pragma unroll
  for (int j = 0; j < KEYS / 16; j++) load_a_trans<KEYS / 8>(a[j], weight, 0, j * 2);
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    uint32_t b[4];
    load_b_trans<D / 8>(b, rows, 0, i * 2);
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
      if (j < blocks) {
        mma_m16n8k16<T>(gradient[j][2 * i], a[j], {b[0], b[1]});
        mma_m16n8k16<T>(gradient[j][2 * i + 1], a[j], {b[2], b[3]});
      }
  }
}

// Add what 16 queries give to a warp's slab of keys. P and dS pass through the warp's own tiles of 16 x KEYS to be transposed.
template <class T, int D, int KEYS, class Hide>
DEVICE void add_queries(Slab<D, KEYS>& slab, const Queries& x, const unsigned char* k_tile, const unsigned char* v_tile,
                        unsigned char* p_tile, unsigned char* ds_tile, int blocks, float scale, Hide hide_pairs) {
  float p[KEYS / 8][4], ds[KEYS / 8][4];
  weights<T, D, KEYS>(p, ds, x, k_tile, v_tile, blocks, scale, hide_pairs);
  warp_barrier();  // the tiles have been read
  store_fragments<T, KEYS>(p_tile, p);
  store_fragments<T, KEYS>(ds_tile, ds);
  warp_barrier();
  accumulate<T, D, KEYS>(slab.dv, p_tile, x.dout, blocks);
  accumulate<T, D, KEYS>(slab.dk, ds_tile, x.q, blocks);
}

// 16 rows of D elements, times `factor`, to those of 16 rows in global memory that exist. Lanes exchange halves first, so that a
// warp writes 32 adjacent bytes of each row at once.
template <class T, int D>
DEVICE void store_rows(T* global, int64_t stride, const float (&x)[D / 8][4], float factor, int rows) {
  int lane = threadIdx.x % 32, odd = lane % 2, column = odd * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = half * 8 + lane / 4;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      uint32_t low = pack<T>(x[2 * i][half * 2] * factor, x[2 * i][half * 2 + 1] * factor);
      uint32_t high = pack<T>(x[2 * i + 1][half * 2] * factor, x[2 * i + 1][half * 2 + 1] * factor);
      uint32_t other = shuffle_xor(odd ? low : high, 1);
      if (row < rows)
        *reinterpret_cast<uint2*>(global + row * stride + i * 16 + column) = odd ? uint2{other, high} : uint2{low, other};
    }
  }
}

}  // namespace fastattn
