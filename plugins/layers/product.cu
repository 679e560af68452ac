// A product of one or two tokens and a weight, which is bound by reading the weight.
#include "layers.cuh"

namespace socket_trt {
namespace layers {
namespace {

constexpr int kRows = 8;   // of a block; a lane asks for a piece of each at once
constexpr int kWarps = 8;  // divide the columns among themselves
constexpr int kThreads = 32 * kWarps;
constexpr int kChunk = 32 * kPiece;  // columns of a warp: 512 bytes side by side

struct Product {
    const __half* activations;
    const __half* weight;
    __half* output;
    int rows;
    int columns;
};

// What is read once a step, past the first cache.  In its place among the program's other volatile instructions: a
// plain load would be moved behind the wait.
__device__ __forceinline__ uint4 load_weight(const __half* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// Sums over the warp of the rows' values; a lane returns that of row `lane % kRows`.
__device__ __forceinline__ float sum_of_row(float (&values)[kRows], int lane) {
#pragma unroll
    for (int width = kRows / 2; width > 0; width /= 2) {
        const bool upper = lane & width;
#pragma unroll
        for (int i = 0; i < width; i++) {
            const float kept = upper ? values[i + width] : values[i], sent = upper ? values[i] : values[i + width];
            values[i] = kept + __shfl_xor_sync(~0u, sent, width);
        }
    }
#pragma unroll
    for (int width = kRows; width < 32; width *= 2) values[0] += __shfl_xor_sync(~0u, values[0], width);
    return values[0];
}

template <int TOKENS>
__global__ void __launch_bounds__(kThreads) product_kernel(Product p) {
    __shared__ float parts[kWarps][TOKENS][kRows];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = blockIdx.x * kRows;
    const __half* const place = p.weight + static_cast<int64_t>(first_row) * p.columns;
    uint4 weight[kRows];
    const auto ask_for_weight = [&](int column) {
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            const bool exists = column < p.columns && first_row + row < p.rows;
            weight[row] = exists ? load_weight(place + row * p.columns + column) : uint4{};
        }
    };
    int column = warp * kChunk + lane * kPiece;
    ask_for_weight(column);
    start_next_kernel();
    wait_for_previous_kernel();

    float sums[TOKENS][kRows] = {};
    while (true) {
        float2 activations[TOKENS][kPiece / 2];
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            const Piece x = column < p.columns ? load(p.activations + token * p.columns + column) : Piece{};
#pragma unroll
            for (int i = 0; i < kPiece / 2; i++) activations[token][i] = __half22float2(x.pair(i));
        }
#pragma unroll
        for (int row = 0; row < kRows; row++) {
            const Piece w{weight[row]};
#pragma unroll
            for (int i = 0; i < kPiece / 2; i++) {
                const float2 pair = __half22float2(w.pair(i));
#pragma unroll
                for (int token = 0; token < TOKENS; token++) {
                    sums[token][row] = fmaf(pair.x, activations[token][i].x, sums[token][row]);
                    sums[token][row] = fmaf(pair.y, activations[token][i].y, sums[token][row]);
                }
            }
        }
        column += kWarps * kChunk;
        if (column - lane * kPiece >= p.columns) break;
        ask_for_weight(column);
    }

#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
        const float sum = sum_of_row(sums[token], lane);
        if (lane < kRows) parts[warp][token][lane] = sum;
    }
    __syncthreads();
    const int token = threadIdx.x / kRows, row = threadIdx.x % kRows;
    if (token >= TOKENS || first_row + row >= p.rows) return;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += parts[w][token][row];
    p.output[static_cast<int64_t>(token) * p.rows + first_row + row] = __float2half_rn(sum);
}

}  // namespace

cudaError_t prepare_product() {
    const cudaError_t status = set_up(product_kernel<1>, 0);
    return status == cudaSuccess ? set_up(product_kernel<2>, 0) : status;
}

}  // namespace layers
}  // namespace socket_trt

int32_t SocketTrtProduct(const void* activations, const void* weight, void* output, int32_t tokens, int32_t rows,
                         int32_t columns, void* stream) {
    using namespace socket_trt::layers;
    static_assert(SOCKET_TRT_MOST_PRODUCT_TOKENS == 2, "a kernel for each number of tokens");
    if (tokens < 1 || tokens > 2 || rows < 1 || columns < kPiece || columns % kPiece != 0) return cudaErrorInvalidValue;
    const Product product{static_cast<const __half*>(activations), static_cast<const __half*>(weight),
                          static_cast<__half*>(output), rows, columns};
    return launch(tokens == 1 ? product_kernel<1> : product_kernel<2>, dim3((rows + kRows - 1) / kRows), kThreads,
                  stream, product);
}
