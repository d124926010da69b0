// Which elements dropout keeps, on a CPU: the draw that fastattn/dropout.py defines, bit by bit. Addresses are checked by the
// callers in fastattn/kernels/cpu/dropout.py.
#pragma once

#include <cstdint>

namespace fastattn {

// Draws the bits of attention's weights that the bounds of a mask leave, and no others. Pair (query i, key j) of sequence b is
// left iff low <= j - i, and j - i <= high or j < prefix[b] or j - i <= prefix_high, and key_begin[b] <= j < key_end[b], and
// i < query_end[b]; of bounds that are not there, tensors are null and numbers the farthest there are.
struct AttentionBits {
  int32_t* bits;  // (B, H, M, words), or of packed sequences (H, rows, words): bit j % 32 of word j / 32
  const int32_t* prefix;
  const int32_t* key_begin;
  const int32_t* key_end;
  const int32_t* query_end;
  const int32_t* query_starts;  // (B + 1,) or null: sequence b has rows query_starts[b] up to query_starts[b + 1]
  const int32_t* key_starts;
  int64_t rows, B, H, M, N;  // of packed sequences M and N are the most of one
  int64_t low, high, prefix_high;
  int64_t seed;
  uint32_t threshold;  // 16 bits of an element are kept iff at least this; 65536 keeps none
};

void attention_bits(const AttentionBits& p, int threads);

// kept: (rows, columns), 1 where an element is kept, else 0. tag: the op's, the last counter's low bits.
void kept_elements(uint8_t* kept, int64_t rows, int64_t columns, int64_t seed, uint32_t threshold, uint32_t tag, int threads);

}  // namespace fastattn
