// What a mask leaves of a tile: the run of keys that a block of queries may see, the run of queries for a block of keys, and
// whether one pair is visible.
//
// The bounds leave query i one interval of keys, [first, last), and neither end moves back as i grows: so the tiles that a block
// visits are one run, and those in which no pair is hidden are a run inside it. With lists (TileLists) the runs are not used.
#pragma once

#include "../common/ptx.cuh"
#include "mask.h"

namespace fastattn {

// The rows of one sequence in a tensor: `count` of them from `first` on.
struct Span {
  int first, count;
};

// For sequence b, of which at most `most` rows count. A kernel that needs it again after a loop calls it again: two numbers are
// read sooner than a register is spared through the loop.
HOST_DEVICE Span span(const Starts& starts, int b, int most) {
  if (starts.data == nullptr) return {0, most};
  int first = min(max(starts.data[b], 0), starts.rows), end = min(max(starts.data[b + 1], first), starts.rows);
  return {first, min(end - first, most)};
}

// The bounds of one sequence.
struct Bounds {
  int begin, end;  // live keys
  int rows;        // live queries
  int prefix;
};

// first <= index < last are visited; of them full_first <= index < full_last hide nothing. Empty where last <= first.
struct Run {
  int first, last, full_first, full_last;
};

// M and N: the sequence's own numbers of queries and keys.
HOST_DEVICE Bounds bounds(const Mask& mask, int b, int M, int N) {
  Bounds r{0, N, M, 0};
  if (mask.key_begin != nullptr) r.begin = max(mask.key_begin[b], 0);
  if (mask.key_end != nullptr) r.end = min(mask.key_end[b], N);
  if (mask.query_end != nullptr) r.rows = min(mask.query_end[b], M);
  if (mask.prefix != nullptr) r.prefix = mask.prefix[b];
  return r;
}

// The first key that query m may see, and one past the last; meaningful for a live query.
HOST_DEVICE int first_key(const Mask& mask, const Bounds& r, int m) {
  int64_t first = r.begin;
  if (mask.has_low) first = max(first, static_cast<int64_t>(m) + mask.low);
  return static_cast<int>(min(first, static_cast<int64_t>(r.end)));
}

HOST_DEVICE int last_key(const Mask& mask, const Bounds& r, int m) {
  int64_t last = r.end;
  if (mask.has_high) last = min(last, static_cast<int64_t>(m) + mask.high + 1);
  if (mask.prefix != nullptr)
    last = min(last, max(static_cast<int64_t>(r.prefix), static_cast<int64_t>(m) + mask.prefix_high + 1));
  return static_cast<int>(max(last, static_cast<int64_t>(0)));
}

// Keys for the queries m0 to m1, both of them live. Hidden keys between (`keys`), ids and bits are not looked at.
HOST_DEVICE Run key_run(const Mask& mask, const Bounds& r, int m0, int m1) {
  return {first_key(mask, r, m0), last_key(mask, r, m1), first_key(mask, r, m1), last_key(mask, r, m0)};
}

// Keys for the `count` queries from m0 on; empty where none of them is live.
HOST_DEVICE Run block_run(const Mask& mask, const Bounds& r, int m0, int count) {
  if (m0 >= r.rows) return {0, 0, 0, 0};
  return key_run(mask, r, m0, m0 + min(count, r.rows - m0) - 1);
}

// The first query that may see key n by the bounds, and one past the last.
DEVICE int first_query(const Mask& mask, const Bounds& r, int n) {
  int64_t first = 0;
  if (mask.has_high) first = max(first, static_cast<int64_t>(n) - mask.high);
  if (mask.prefix != nullptr && n >= r.prefix) first = max(first, static_cast<int64_t>(n) - mask.prefix_high);
  return static_cast<int>(min(first, static_cast<int64_t>(r.rows)));
}

DEVICE int last_query(const Mask& mask, const Bounds& r, int n) {
  int64_t last = r.rows;
  if (mask.has_low) last = min(last, static_cast<int64_t>(n) - mask.low + 1);
  return static_cast<int>(max(last, static_cast<int64_t>(0)));
}

// Queries for the keys n0 to n1, within [begin, end).
DEVICE Run query_run(const Mask& mask, const Bounds& r, int n0, int n1) {
  return {first_query(mask, r, n0), last_query(mask, r, n1), first_query(mask, r, n1), last_query(mask, r, n0)};
}

// Whether some query may see key n, and some key query m, as far as the sequence's own padding goes: what is not live may hold
// NaN.
DEVICE bool live_key(const Mask& mask, const Bounds& r, int b, int n) {
  if (n < r.begin || n >= r.end) return false;
  if (mask.keys != nullptr && mask.keys[b * mask.keys_batch + n * mask.keys_key] == 0) return false;
  return mask.key_ids == nullptr || mask.key_ids[b * mask.key_ids_batch + n * mask.key_ids_key] >= 0;
}

DEVICE bool live_query(const Mask& mask, const Bounds& r, int b, int m) {
  return m < r.rows && (mask.ids == nullptr || mask.ids[b * mask.ids_batch + m * mask.ids_query] >= 0);
}

// Whether query m sees key n, both of them live.
DEVICE bool visible(const Mask& mask, const Bounds& r, int b, int h, int m, int n) {
  int64_t distance = static_cast<int64_t>(n) - m;
  if (mask.has_low && distance < mask.low) return false;
  if (mask.has_high && distance > mask.high) return false;
  if (mask.prefix != nullptr && n >= r.prefix && distance > mask.prefix_high) return false;
  if (mask.ids != nullptr &&
      mask.ids[b * mask.ids_batch + m * mask.ids_query] != mask.key_ids[b * mask.key_ids_batch + n * mask.key_ids_key])
    return false;
  if (mask.bits == nullptr) return true;
  uint32_t word =
      static_cast<uint32_t>(mask.bits[b * mask.bits_batch + h * mask.bits_head + m * mask.bits_row + n / 32 * mask.bits_word]);
  return (word >> (n % 32) & 1) != 0;
}

}  // namespace fastattn
