// Root mean square norms, of the residual stream after a branch is added to it too: a block a row.
#include "layers.cuh"

namespace socket_trt {
namespace layers {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kPieces = 2;  // that a thread can hold
constexpr int kMostColumns = kMostThreads * kPieces * kPiece;

struct Norm {
    const __half* input;
    const __half* branch;  // with its sum; or neither
    const __half* weight;
    __half* sum;
    __half* normed;
    int columns;
    float epsilon;
    bool plus_one;
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int width = 16; width > 0; width /= 2) x += __shfl_xor_sync(~0u, x, width);
    return x;
}

// Times the weight, which models round for differently: float16(x) weight, or float16(x (1 + weight)).
__device__ __forceinline__ __half2 weighted(float2 x, __half2 weight, bool plus_one) {
    if (!plus_one) return __hmul2(__floats2half2_rn(x.x, x.y), weight);
    const float2 by = __half22float2(weight);
    return __floats2half2_rn(x.x * (1.f + by.x), x.y * (1.f + by.y));
}

template <bool ADDS>
__global__ void __launch_bounds__(kMostThreads) norm_kernel(Norm p) {
    __shared__ float parts[kMostThreads / 32];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * p.columns;
    Piece x[kPieces], weight[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kPiece;
        if (column < p.columns) weight[i].bytes = __ldg(reinterpret_cast<const uint4*>(p.weight + column));
    }
    start_next_kernel();
    wait_for_previous_kernel();

    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kPiece;
        if (column >= p.columns) break;
        x[i] = load(p.input + first + column);
        Piece branch;
        if (ADDS) branch = load(p.branch + first + column);
#pragma unroll
        for (int pair = 0; pair < kPiece / 2; pair++) {
            if (ADDS) x[i].pair(pair) = __hadd2(x[i].pair(pair), branch.pair(pair));
            const float2 two = __half22float2(x[i].pair(pair));
            squares += two.x * two.x + two.y * two.y;
        }
        if (ADDS) store(p.sum + first + column, x[i]);
    }
    squares = sum_of_warp(squares);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
    const float scale = rsqrtf(squares / p.columns + p.epsilon);

#pragma unroll
    for (int i = 0; i < kPieces; i++) {
        const int column = (i * blockDim.x + threadIdx.x) * kPiece;
        if (column >= p.columns) break;
#pragma unroll
        for (int pair = 0; pair < kPiece / 2; pair++) {
            const float2 two = __half22float2(x[i].pair(pair));
            const float2 scaled = make_float2(two.x * scale, two.y * scale);
            x[i].pair(pair) = weighted(scaled, weight[i].pair(pair), p.plus_one);
        }
        store(p.normed + first + column, x[i]);
    }
}

template <bool ADDS>
int32_t launch_norm(const Norm& norm, int rows, void* stream) {
    if (rows < 1 || norm.columns < kPiece || norm.columns % kPiece != 0 || norm.columns > kMostColumns) {
        return cudaErrorInvalidValue;
    }
    const int pieces = norm.columns / kPiece, threads = (pieces + 31) / 32 * 32;
    return launch(norm_kernel<ADDS>, dim3(rows), threads < kMostThreads ? threads : kMostThreads, stream, norm);
}

}  // namespace

cudaError_t prepare_norm() {
    const cudaError_t status = set_up(norm_kernel<false>, 0);
    return status == cudaSuccess ? set_up(norm_kernel<true>, 0) : status;
}

}  // namespace layers
}  // namespace socket_trt

int32_t SocketTrtRmsNorm(const void* input, const void* weight, void* normed, int32_t rows, int32_t columns,
                         float epsilon, int32_t plus_one, void* stream) {
    using namespace socket_trt::layers;
    const Norm norm{static_cast<const __half*>(input),
                    nullptr,
                    static_cast<const __half*>(weight),
                    nullptr,
                    static_cast<__half*>(normed),
                    columns,
                    epsilon,
                    plus_one != 0};
    return launch_norm<false>(norm, rows, stream);
}

int32_t SocketTrtAddRmsNorm(const void* residual, const void* branch, const void* weight, void* sum, void* normed,
                            int32_t tokens, int32_t columns, float epsilon, int32_t plus_one, void* stream) {
    using namespace socket_trt::layers;
    const Norm norm{static_cast<const __half*>(residual),
                    static_cast<const __half*>(branch),
                    static_cast<const __half*>(weight),
                    static_cast<__half*>(sum),
                    static_cast<__half*>(normed),
                    columns,
                    epsilon,
                    plus_one != 0};
    return launch_norm<true>(norm, tokens, stream);
}
