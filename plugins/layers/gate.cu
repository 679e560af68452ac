// The gate of an MLP: silu(gate) * up.
#include "layers.cuh"

namespace socket_trt {
namespace layers {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float silu(float x) {
    return x / (1.f + __expf(-x));
}

__global__ void __launch_bounds__(kThreads) gate_kernel(const __half* joint, __half* output, int columns) {
    start_next_kernel();
    wait_for_previous_kernel();
    const int column = (blockIdx.x * kThreads + threadIdx.x) * kPiece;
    if (column >= columns) return;
    const int64_t token = blockIdx.y;
    const __half* const from = joint + token * 2 * columns + column;
    Piece gate = load(from);
    const Piece up = load(from + columns);
#pragma unroll
    for (int i = 0; i < kPiece / 2; i++) {
        const float2 x = __half22float2(gate.pair(i));
        gate.pair(i) = __hmul2(__floats2half2_rn(silu(x.x), silu(x.y)), up.pair(i));
    }
    store(output + token * columns + column, gate);
}

}  // namespace

cudaError_t prepare_gate() {
    return set_up(gate_kernel, 0);
}

}  // namespace layers
}  // namespace socket_trt

int32_t SocketTrtSwiGlu(const void* joint, void* output, int32_t tokens, int32_t columns, void* stream) {
    using namespace socket_trt::layers;
    if (tokens < 1 || tokens > 65535 || columns < kPiece || columns % kPiece != 0) return cudaErrorInvalidValue;
    const int pieces = columns / kPiece;
    return launch(gate_kernel, dim3((pieces + kThreads - 1) / kThreads, tokens), kThreads, stream,
                  static_cast<const __half*>(joint), static_cast<__half*>(output), columns);
}

int32_t SocketTrtPrepareLayers(void) {
    using namespace socket_trt::layers;
    for (const auto prepare : {prepare_product, prepare_norm, prepare_rotary, prepare_gate}) {
        const cudaError_t status = prepare();
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}
