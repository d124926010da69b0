// Kernel launches on a GPU, included by ptx.cuh. Every launch is checked, and a failure is an exception with the kernel's name.
//
// The device and the stream are the caller's (PyTorch's): nothing here sets a device, synchronises or allocates, so launches can
// be captured into a CUDA graph. What a kernel needs once per device, loading its code and asking for shared memory, happens at
// its first launch there, which must therefore lie outside of a capture.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastattn {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that an error that can be recovered from is not reported again by the next call
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

// The shared memory that a block may ask for on the current device, in bytes.
inline int shared_memory_limit(const char* kernel) {
  int device, bytes;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kernel);
  return bytes;
}

inline void prepare(const char* name, const void* kernel, const Launch& where) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(where.stream), &status), name);
  if (status != cudaStreamCaptureStatusNone)
    throw std::runtime_error(std::string(name) +
                             ": the first launch on a device cannot be captured; call it once before the capture");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit(name)), name);
}

// `kernel` takes its arguments as one struct.
template <auto kernel, class Arguments>
void launch(const char* name, const Launch& where, Arguments arguments) {
  static std::atomic<uint64_t> prepared{0};  // a bit per device
  if (where.blocks == 0) return;
  if (where.blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 blocks");
  int device;
  check(cudaGetDevice(&device), name);
  uint64_t bit = uint64_t{1} << (device % 64);
  if (!(prepared.load() & bit)) {
    prepare(name, reinterpret_cast<const void*>(kernel), where);
    prepared.fetch_or(bit);
  }
  void* packed[] = {&arguments};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(where.blocks)), dim3(where.threads),
                         packed, where.shared_bytes, reinterpret_cast<cudaStream_t>(where.stream)),
        name);
}

}  // namespace fastattn
