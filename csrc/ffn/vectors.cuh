// Eight adjacent elements of a row in global memory, as fp32: in 16-byte accesses where the rows allow it, one by one elsewhere.
#pragma once

#include "../common/ptx.cuh"

namespace fastattn {

DEVICE float to_float(float x) { return x; }

// x[0 .. count - 1], the rest 0; count is at most 8.
template <class T>
DEVICE void load_8(float (&values)[8], const T* x, int count, bool vectors) {
  if (vectors && count == 8) {
    T elements[8];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements)) / 16; i++)
      reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(x)[i];
#pragma unroll
    for (int e = 0; e < 8; e++) values[e] = to_float(elements[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) values[e] = e < count ? to_float(x[e]) : 0.0f;
  }
}

template <class T>
DEVICE void store_8(T* x, const float (&values)[8], int count, bool vectors) {
  if (vectors && count == 8) {
    *reinterpret_cast<uint4*>(x) = uint4{pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                         pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (e < count) x[e] = from_float<T>(values[e]);
  }
}

DEVICE void store_8(float* x, const float (&values)[8], int count, bool vectors) {
  if (vectors && count == 8) {
    reinterpret_cast<float4*>(x)[0] = float4{values[0], values[1], values[2], values[3]};
    reinterpret_cast<float4*>(x)[1] = float4{values[4], values[5], values[6], values[7]};
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (e < count) x[e] = values[e];
  }
}

}  // namespace fastattn
