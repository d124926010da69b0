// Each primitive of common/ptx.cuh, alone: a block reads words per thread, applies it and writes words per thread. A GPU and the
// emulator must agree lane by lane (tests/emulator/test_conformance.py); the emulator is held to the PTX ISA by
// test_primitives.py.
#include <stdexcept>
#include <string>

#include "common/ptx.cuh"

namespace fastattn {
namespace {

struct Arguments {
  const uint32_t* input;
  uint32_t* output;
};

// A primitive: threads of its block, words in and out per thread, and what a thread does with them.
template <int T, int I, int O>
struct Shape {
  static constexpr int THREADS = T, INPUTS = I, OUTPUTS = O;
};

template <class Primitive>
KERNEL(Primitive::THREADS, 1)
conformance(KERNEL_ARGUMENT Arguments arguments) {
  SHARED_MEMORY(shared);
  size_t thread = static_cast<size_t>(blockIdx.x) * Primitive::THREADS + threadIdx.x;
  Primitive::run(arguments.input + thread * Primitive::INPUTS, arguments.output + thread * Primitive::OUTPUTS, shared);
}

constexpr int SHARED_BYTES = 4096;

// In: a, b, d. Out: d.

struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

DEVICE Fragments load_fragments(const uint32_t* in) {
  Fragments f;
  for (int i = 0; i < 4; i++) f.a[i] = in[i];
  for (int i = 0; i < 2; i++) f.b[i] = in[4 + i];
  for (int i = 0; i < 4; i++) f.d[i] = __uint_as_float(in[6 + i]);
  return f;
}

DEVICE void store_floats(uint32_t* out, const float (&d)[4]) {
  for (int i = 0; i < 4; i++) out[i] = __float_as_uint(d[i]);
}

template <class T>
struct Mma : Shape<32, 10, 4> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    Fragments f = load_fragments(in);
    mma_m16n8k16<T>(f.d, f.a, f.b);
    store_floats(out, f.d);
  }
};

// In: as above, of a and b the first half.
template <class T>
struct MmaK8 : Shape<32, 10, 4> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    Fragments f = load_fragments(in);
    mma_m16n8k8<T>(f.d, {f.a[0], f.a[1]}, f.b[0]);
    store_floats(out, f.d);
  }
};

struct MmaTf32 : Shape<32, 10, 4> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    Fragments f = load_fragments(in);
    mma_m16n8k8_tf32(f.d, f.a, f.b);
    store_floats(out, f.d);
  }
};

// In: 16 bytes, which become the row of that number. Lanes address the rows in reverse. Out: the fragments.
template <int MATRICES, bool TRANSPOSED>
struct Ldmatrix : Shape<32, 4, MATRICES> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* rows = reinterpret_cast<uint32_t*>(shared);
    for (int i = 0; i < 4; i++) rows[threadIdx.x * 4 + i] = in[i];
    warp_barrier();
    const uint32_t* row = rows + (31 - threadIdx.x) * 4;
    uint32_t r[MATRICES];
    if constexpr (MATRICES == 2 && !TRANSPOSED) ldmatrix_x2(r, row);
    if constexpr (MATRICES == 4 && !TRANSPOSED) ldmatrix_x4(r, row);
    if constexpr (MATRICES == 2 && TRANSPOSED) ldmatrix_x2_trans(r, row);
    if constexpr (MATRICES == 4 && TRANSPOSED) ldmatrix_x4_trans(r, row);
    for (int i = 0; i < MATRICES; i++) out[i] = r[i];
  }
};

// In: 16 bytes, then how many of them to copy (modulo 17). Out: what was copied.
struct CpAsync : Shape<32, 8, 4> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* mine = reinterpret_cast<uint32_t*>(shared) + threadIdx.x * 4;
    cp_async_16(mine, in, static_cast<int>(in[4] % 17));
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; i++) out[i] = mine[i];
  }
};

// Two groups of 16 bytes, the first of which is used while the second may be under way.
struct CpAsyncGroups : Shape<32, 8, 8> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* mine = reinterpret_cast<uint32_t*>(shared) + threadIdx.x * 8;
    for (int group = 0; group < 2; group++) {
      cp_async_16(mine + 4 * group, in + 4 * group, 16);
      cp_async_commit();
    }
    cp_async_wait<1>();
    for (int i = 0; i < 4; i++) out[i] = mine[i];
    cp_async_wait<0>();
    for (int i = 4; i < 8; i++) out[i] = mine[i];
  }
};

// In: a value, and the lane, mask or delta. Out: the value received.

struct Shuffle : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = shuffle(in[0], static_cast<int>(in[1] % 64));
  }
};
struct ShuffleXor : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = shuffle_xor(in[0], static_cast<int>(in[1] % 32));
  }
};
struct ShuffleUp : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = shuffle_up(in[0], static_cast<int>(in[1] % 32));
  }
};
struct ShuffleDown : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = shuffle_down(in[0], static_cast<int>(in[1] % 32));
  }
};
struct ShuffleFloat : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(shuffle(__uint_as_float(in[0]), static_cast<int>(in[1] % 32)));
  }
};
struct Shuffle64Bit : Shape<32, 3, 2> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    uint64_t value = shuffle(static_cast<uint64_t>(in[1]) << 32 | in[0], static_cast<int>(in[2] % 32));
    out[0] = static_cast<uint32_t>(value);
    out[1] = static_cast<uint32_t>(value >> 32);
  }
};

// In: a predicate. Out: the vote.

struct VoteBallot : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) { out[0] = vote_ballot(in[0] != 0); }
};
struct VoteAny : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) { out[0] = vote_any(in[0] != 0); }
};
struct VoteAll : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) { out[0] = vote_all(in[0] != 0); }
};

// In: a value per thread. Out: that of the thread counted from the end.

struct WarpBarrier : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* values = reinterpret_cast<uint32_t*>(shared);
    values[threadIdx.x] = in[0];
    warp_barrier();
    out[0] = values[31 - threadIdx.x];
  }
};

struct BlockBarrier : Shape<64, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* values = reinterpret_cast<uint32_t*>(shared);
    values[threadIdx.x] = in[0];
    block_barrier();
    out[0] = values[63 - threadIdx.x];
  }
};

// Each of two warps hands its values to the other; the giver arrives, the taker waits.
struct NamedBarriers : Shape<64, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    uint32_t* values = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x < 32) {
      values[threadIdx.x] = in[0];
      named_barrier_arrive(1, 64);
      named_barrier_sync(2, 64);
    } else {
      values[threadIdx.x] = in[0];
      named_barrier_arrive(2, 64);
      named_barrier_sync(1, 64);
    }
    out[0] = values[63 - threadIdx.x];
  }
};

// Element by element.

template <class T>
struct ToFloat : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(to_float(T{static_cast<uint16_t>(in[0])}));
  }
};
template <class T>
struct FromFloat : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = from_float<T>(__uint_as_float(in[0])).bits;
  }
};
template <class T>
struct Pack : Shape<32, 2, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = pack<T>(__uint_as_float(in[0]), __uint_as_float(in[1]));
  }
};
struct ToTf32 : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) { out[0] = to_tf32(__uint_as_float(in[0])); }
};
struct Exp2 : Shape<32, 1, 1> {
  static DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(exp2_approximate(__uint_as_float(in[0])));
  }
};

struct Entry {
  const char* name;
  int threads;
  size_t input_bytes, output_bytes;  // of a block
  void (*run)(const char*, const Launch&, Arguments);
};

template <class Primitive>
constexpr Entry entry(const char* name) {
  return {name, Primitive::THREADS, size_t{4} * Primitive::THREADS * Primitive::INPUTS,
          size_t{4} * Primitive::THREADS * Primitive::OUTPUTS, launch<conformance<Primitive>, Arguments>};
}

constexpr Entry ENTRIES[] = {
    entry<Mma<Half>>("mma_m16n8k16<Half>"),
    entry<Mma<Bfloat16>>("mma_m16n8k16<Bfloat16>"),
    entry<MmaK8<Half>>("mma_m16n8k8<Half>"),
    entry<MmaK8<Bfloat16>>("mma_m16n8k8<Bfloat16>"),
    entry<MmaTf32>("mma_m16n8k8_tf32"),
    entry<Ldmatrix<2, false>>("ldmatrix_x2"),
    entry<Ldmatrix<4, false>>("ldmatrix_x4"),
    entry<Ldmatrix<2, true>>("ldmatrix_x2_trans"),
    entry<Ldmatrix<4, true>>("ldmatrix_x4_trans"),
    entry<CpAsync>("cp_async_16"),
    entry<CpAsyncGroups>("cp_async_wait<1>"),
    entry<Shuffle>("shuffle"),
    entry<ShuffleXor>("shuffle_xor"),
    entry<ShuffleUp>("shuffle_up"),
    entry<ShuffleDown>("shuffle_down"),
    entry<ShuffleFloat>("shuffle<float>"),
    entry<Shuffle64Bit>("shuffle<uint64_t>"),
    entry<VoteBallot>("vote_ballot"),
    entry<VoteAny>("vote_any"),
    entry<VoteAll>("vote_all"),
    entry<WarpBarrier>("warp_barrier"),
    entry<BlockBarrier>("block_barrier"),
    entry<NamedBarriers>("named_barriers"),
    entry<ToFloat<Half>>("to_float(Half)"),
    entry<ToFloat<Bfloat16>>("to_float(Bfloat16)"),
    entry<FromFloat<Half>>("from_float<Half>"),
    entry<FromFloat<Bfloat16>>("from_float<Bfloat16>"),
    entry<Pack<Half>>("pack<Half>"),
    entry<Pack<Bfloat16>>("pack<Bfloat16>"),
    entry<ToTf32>("to_tf32"),
    entry<Exp2>("exp2_approximate"),
};

}  // namespace
}  // namespace fastattn

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Runs a primitive in as many blocks as the input has room for. Returns null, or what went wrong until the next call.
EXPORTED const char* fastattn_conformance(const char* primitive, const void* input, size_t input_bytes, void* output,
                                          size_t output_bytes, uintptr_t stream) {
  static std::string error;
  using namespace fastattn;
  try {
    for (const Entry& e : ENTRIES) {
      if (std::string(primitive) != e.name) continue;
      size_t blocks = input_bytes / e.input_bytes;
      if (blocks * e.input_bytes != input_bytes || blocks * e.output_bytes != output_bytes)
        throw std::runtime_error("input and output must be whole blocks, as many in both");
      e.run(e.name, {static_cast<int64_t>(blocks), e.threads, SHARED_BYTES, stream},
            {static_cast<const uint32_t*>(input), static_cast<uint32_t*>(output)});
      return nullptr;
    }
    throw std::runtime_error("no such primitive");
  } catch (const std::exception& exception) {
    error = std::string(primitive) + ": " + exception.what();
    return error.c_str();
  }
}

// A line for each primitive: name, bytes in and bytes out of one block.
EXPORTED const char* fastattn_conformance_primitives() {
  static std::string lines;
  lines.clear();
  for (const fastattn::Entry& e : fastattn::ENTRIES)
    lines += std::string(e.name) + " " + std::to_string(e.input_bytes) + " " + std::to_string(e.output_bytes) + "\n";
  return lines.c_str();
}
