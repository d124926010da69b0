// Philox-4x32-10 (Salmon et al., 2011) for a block of words at a time. A word is the 32 columns from a multiple of 32 on; 4 calls
// make it, each 8 of its bits.
#include "dropout.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#endif

namespace fastattn {
namespace {

constexpr int LANES = 64;  // words of a block
constexpr int ROUNDS = 10;
constexpr uint32_t FIRST = 0xD2511F53, SECOND = 0xCD9E8D57;  // the multipliers
constexpr uint32_t TAGGED = 0x80000000;
constexpr int64_t ALONE = 4096;  // words that one thread draws sooner than it wakes others

struct Key {
  uint32_t low[ROUNDS], high[ROUNDS];  // in each round

  explicit Key(int64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < ROUNDS; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) low[round] = k0, high[round] = k1;
  }
};

// Words to be drawn: which 32 columns, and the counters of their rows.
struct Block {
  alignas(64) uint32_t word[LANES], c1[LANES], c2[LANES], c3[LANES], bits[LANES];
};

// Bits 0 and 1: whether the low and the high 16 bits are at least the threshold.
inline uint32_t pair(uint32_t drawn, uint32_t threshold) {
  return static_cast<uint32_t>((drawn & 0xFFFF) >= threshold) | static_cast<uint32_t>((drawn >> 16) >= threshold) << 1;
}

// Fills `bits`.
void draw_plainly(Block& block, const Key& key, uint32_t threshold) {
  for (int lane = 0; lane < LANES; lane++) block.bits[lane] = 0;
  for (uint32_t call = 0; call < 4; call++) {
    for (int lane = 0; lane < LANES; lane++) {
      uint32_t c0 = block.word[lane] * 4 + call, c1 = block.c1[lane], c2 = block.c2[lane], c3 = block.c3[lane];
#pragma GCC unroll 10  // so that the loop over lanes is one that compilers make vectors of
      for (int round = 0; round < ROUNDS; round++) {
        uint64_t first = static_cast<uint64_t>(c0) * FIRST, second = static_cast<uint64_t>(c2) * SECOND;
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ key.low[round];
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ key.high[round];
        c1 = static_cast<uint32_t>(second), c3 = static_cast<uint32_t>(first);
      }
      uint32_t eighth = pair(c0, threshold) | pair(c1, threshold) << 8 | pair(c2, threshold) << 16 | pair(c3, threshold) << 24;
      block.bits[lane] |= eighth << (2 * call);
    }
  }
}

#ifdef AVX2
// The four counters of 4 calls, in the low halves of 64 bits. What the high halves hold does not matter: products leave it out,
// and nothing else moves bits down but the shift of a product.
struct Calls {
  __m256i c[4];
};

AVX2 inline void philox(Calls& x, const Key& key) {
  const __m256i by_first = _mm256_set1_epi64x(FIRST), by_second = _mm256_set1_epi64x(SECOND);
#pragma GCC unroll 10
  for (int round = 0; round < ROUNDS; round++) {
    const __m256i low = _mm256_set1_epi32(static_cast<int>(key.low[round]));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(key.high[round]));
    const __m256i first = _mm256_mul_epu32(x.c[0], by_first), second = _mm256_mul_epu32(x.c[2], by_second);
    x.c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(second, 32), x.c[1]), low);
    x.c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(first, 32), x.c[3]), high);
    x.c[1] = second, x.c[3] = first;
  }
}

// `bit` in each lane whose value is at least the threshold.
AVX2 inline __m256i bit_where_kept(__m256i value, __m256i threshold, uint32_t bit) {
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(value, threshold), value);
  return _mm256_and_si256(kept, _mm256_set1_epi32(static_cast<int>(bit)));
}

AVX2 inline __m256i load(const uint32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// The same of 8 words at a time: those of even lanes, and those of odd ones, are calls of their own until they are drawn.
AVX2 void draw_by_avx2(Block& block, const Key& key, uint32_t threshold) {
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold)), halves = _mm256_set1_epi32(0xFFFF);
  for (int lane = 0; lane < LANES; lane += 8) {
    const __m256i c0 = _mm256_slli_epi32(load(block.word + lane), 2);
    const __m256i c1 = load(block.c1 + lane), c2 = load(block.c2 + lane), c3 = load(block.c3 + lane);
    __m256i bits = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int call = 0; call < 4; call++) {
      Calls even{{_mm256_or_si256(c0, _mm256_set1_epi32(call)), c1, c2, c3}}, odd;
      for (int i = 0; i < 4; i++) odd.c[i] = _mm256_srli_epi64(even.c[i], 32);
      philox(even, key);
      philox(odd, key);
      for (int i = 0; i < 4; i++) {
        const __m256i drawn = _mm256_blend_epi32(even.c[i], _mm256_slli_epi64(odd.c[i], 32), 0b10101010);
        const uint32_t bit = 1u << (8 * i + 2 * call);
        bits = _mm256_or_si256(bits, bit_where_kept(_mm256_and_si256(drawn, halves), least, bit));
        bits = _mm256_or_si256(bits, bit_where_kept(_mm256_srli_epi32(drawn, 16), least, bit << 1));
      }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(block.bits + lane), bits);
  }
}

void draw(Block& block, const Key& key, uint32_t threshold) {
  static const bool avx2 = __builtin_cpu_supports("avx2") != 0;
  avx2 ? draw_by_avx2(block, key, threshold) : draw_plainly(block, key, threshold);
}
#else
void draw(Block& block, const Key& key, uint32_t threshold) { draw_plainly(block, key, threshold); }
#endif

// Collects words and hands on each, with the number that came with it, once it is drawn.
template <class Take>
class Drawer {
 public:
  Drawer(const Key& key, uint32_t threshold, Take take) : key(key), threshold(threshold), take(take) {}
  ~Drawer() { flush(); }

  void add(uint32_t word, uint32_t c1, uint32_t c2, uint32_t c3, int64_t place) {
    block.word[count] = word, block.c1[count] = c1, block.c2[count] = c2, block.c3[count] = c3, places[count] = place;
    if (++count == LANES) flush();
  }

 private:
  Block block{};
  int64_t places[LANES];
  int count = 0;
  const Key& key;
  uint32_t threshold;
  Take take;

  void flush() {
    if (count == 0) return;
    draw(block, key, threshold);
    for (int lane = 0; lane < count; lane++) take(places[lane], block.bits[lane]);
    count = 0;
  }
};

// Keys [first, last) that the bounds leave query i of sequence b, which has N of them.
void key_interval(const AttentionBits& p, int64_t b, int64_t i, int64_t N, int64_t& first, int64_t& last) {
  first = std::max<int64_t>(p.key_begin != nullptr ? std::max(p.key_begin[b], 0) : 0, i + p.low);
  int64_t most = i + p.high + 1;
  if (p.prefix != nullptr) most = std::min(most, std::max<int64_t>(p.prefix[b], i + p.prefix_high + 1));
  last = std::min(most, p.key_end != nullptr ? std::min<int64_t>(p.key_end[b], N) : N);
}

int64_t length(const int32_t* starts, int64_t b, int64_t rows, int64_t most, int64_t& begin) {
  begin = std::clamp<int64_t>(starts[b], 0, rows);
  return std::clamp<int64_t>(std::min<int64_t>(starts[b + 1], rows) - begin, 0, most);
}

constexpr std::array<uint64_t, 256> spread_bytes() {
  std::array<uint64_t, 256> table{};
  for (uint64_t byte = 0; byte < 256; byte++)
    for (int bit = 0; bit < 8; bit++) table[byte] |= (byte >> bit & 1) << 8 * bit;  // in little-endian order
  return table;
}
constexpr std::array<uint64_t, 256> SPREAD = spread_bytes();

}  // namespace

void attention_bits(const AttentionBits& p, int threads) {
  const Key key(p.seed);
  const int64_t words = (p.N + 31) / 32, heads = p.B * p.H, parts = (p.M + 63) / 64;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (heads * p.M * words > ALONE)
  for (int64_t part = 0; part < heads * parts; part++) {
    const int64_t head = part / parts, b = head / p.H, h = head % p.H;
    int64_t M = p.M, N = p.N, begin = 0;
    if (p.query_starts != nullptr) {
      N = length(p.key_starts, b, INT32_MAX, N, begin);
      M = length(p.query_starts, b, p.rows, M, begin);
    }
    if (p.query_end != nullptr) M = std::min<int64_t>(M, p.query_end[b]);
    int32_t* bits = p.bits + (p.query_starts != nullptr ? h * p.rows + begin : head * p.M) * words;
    auto take = [bits](int64_t place, uint32_t drawn) { bits[place] = static_cast<int32_t>(drawn); };
    Drawer drawer(key, p.threshold, take);
    for (int64_t i = part % parts * 64; i < std::min(M, part % parts * 64 + 64); i++) {
      int64_t first, last;
      key_interval(p, b, i, N, first, last);
      for (int64_t word = first / 32; word < (last + 31) / 32 && first < last; word++)
        drawer.add(static_cast<uint32_t>(word), static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b),
                   i * words + word);
    }
  }
}

void kept_elements(uint8_t* kept, int64_t rows, int64_t columns, int64_t seed, uint32_t threshold, uint32_t tag, int threads) {
  const Key key(seed);
  const int64_t words = (columns + 31) / 32, total = rows * words, part = 1024;
#pragma omp parallel for num_threads(threads) if (total > ALONE)
  for (int64_t start = 0; start < total; start += part) {
    auto take = [=](int64_t index, uint32_t drawn) {
      const int64_t column = index % words * 32;
      std::array<uint64_t, 4> bytes;
      for (int eight = 0; eight < 4; eight++) bytes[eight] = SPREAD[drawn >> 8 * eight & 255];
      std::memcpy(kept + index / words * columns + column, bytes.data(), std::min<int64_t>(32, columns - column));
    };
    Drawer drawer(key, threshold, take);
    for (int64_t index = start; index < std::min(total, start + part); index++) {
      const int64_t row = index / words;
      drawer.add(static_cast<uint32_t>(index % words), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), TAGGED | tag,
                 index);
    }
  }
}

}  // namespace fastattn
