// What the kernels of layers share: eight columns at a time, and how they are launched.
#ifndef SOCKET_TRT_LAYERS_CUH_
#define SOCKET_TRT_LAYERS_CUH_

#include <cuda_fp16.h>

#include "../src/device.cuh"
#include "../src/launchers.h"
#include "socket_trt/layers.h"

namespace socket_trt {
namespace layers {

constexpr int kPiece = 8;  // columns in 16 bytes

struct Piece {
    uint4 bytes;

    __device__ __forceinline__ __half2& pair(int i) { return reinterpret_cast<__half2*>(&bytes)[i]; }
    __device__ __forceinline__ __half2 pair(int i) const { return reinterpret_cast<const __half2*>(&bytes)[i]; }
};
__device__ __forceinline__ Piece load(const __half* from) {
    return Piece{*reinterpret_cast<const uint4*>(from)};
}
__device__ __forceinline__ void store(__half* to, const Piece& piece) {
    *reinterpret_cast<uint4*>(to) = piece.bytes;
}

// Whether the current device's kernels can begin while the one before still runs.
inline bool overlaps() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <typename... Parameters, typename... Values>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Values&... values) {
    Launch launch(grid, dim3(threads), 0, static_cast<cudaStream_t>(stream));
    return launch.overlapped(overlaps())(kernel, values...);
}

cudaError_t prepare_product();
cudaError_t prepare_norm();
cudaError_t prepare_rotary();
cudaError_t prepare_gate();

}  // namespace layers
}  // namespace socket_trt

#endif  // SOCKET_TRT_LAYERS_CUH_
