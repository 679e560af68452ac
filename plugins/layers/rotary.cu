// From the rows of one product to queries, keys and values, the former two with their rotary embedding.
#include "layers.cuh"

namespace socket_trt {
namespace layers {
namespace {

constexpr int kThreads = 128;

struct Rotary {
    const __half* joint;
    const __half* cosines;
    const __half* sines;
    __half* query;
    __half* key;
    __half* value;
    int tokens;
    int query_heads;
    int kv_heads;
    int head_size;
};

// A thread takes a piece of a head's first half and the same of its second.
__global__ void __launch_bounds__(kThreads) rotary_kernel(Rotary p) {
    start_next_kernel();
    wait_for_previous_kernel();
    const int half = p.head_size / 2, heads = p.query_heads + 2 * p.kv_heads;
    const int index = blockIdx.x * kThreads + threadIdx.x, column = index % (half / kPiece) * kPiece;
    const int joint_head = index / (half / kPiece);
    if (joint_head >= heads) return;
    const int64_t token = blockIdx.y;
    const __half* const from = p.joint + (token * heads + joint_head) * p.head_size + column;
    Piece first = load(from), second = load(from + half);
    const bool of_query = joint_head < p.query_heads, of_value = joint_head >= p.query_heads + p.kv_heads;
    const int head = of_query ? joint_head : (joint_head - p.query_heads) % p.kv_heads;
    __half* to = of_query ? p.query : of_value ? p.value : p.key;
    if (!of_value) {
        const int64_t at = token * p.head_size + column;
        const Piece cosines[2] = {load(p.cosines + at), load(p.cosines + at + half)};
        const Piece sines[2] = {load(p.sines + at), load(p.sines + at + half)};
#pragma unroll
        for (int i = 0; i < kPiece / 2; i++) {
            const float2 x = __half22float2(first.pair(i)), y = __half22float2(second.pair(i));
            const float2 cos_x = __half22float2(cosines[0].pair(i)), cos_y = __half22float2(cosines[1].pair(i));
            const float2 sin_x = __half22float2(sines[0].pair(i)), sin_y = __half22float2(sines[1].pair(i));
            first.pair(i) = __floats2half2_rn(x.x * cos_x.x - y.x * sin_x.x, x.y * cos_x.y - y.y * sin_x.y);
            second.pair(i) = __floats2half2_rn(y.x * cos_y.x + x.x * sin_y.x, y.y * cos_y.y + x.y * sin_y.y);
        }
    }
    to += (static_cast<int64_t>(head) * p.tokens + token) * p.head_size + column;
    store(to, first);
    store(to + half, second);
}

}  // namespace

cudaError_t prepare_rotary() {
    return set_up(rotary_kernel, 0);
}

}  // namespace layers
}  // namespace socket_trt

int32_t SocketTrtSplitRotary(const void* joint, const void* cosines, const void* sines, void* query, void* key,
                             void* value, int32_t tokens, int32_t query_heads, int32_t kv_heads, int32_t head_size,
                             void* stream) {
    using namespace socket_trt::layers;
    const bool whole = head_size >= 2 * kPiece && head_size % (2 * kPiece) == 0;
    if (tokens < 1 || tokens > 65535 || query_heads < 1 || kv_heads < 1 || !whole) return cudaErrorInvalidValue;
    const Rotary rotary{static_cast<const __half*>(joint),
                        static_cast<const __half*>(cosines),
                        static_cast<const __half*>(sines),
                        static_cast<__half*>(query),
                        static_cast<__half*>(key),
                        static_cast<__half*>(value),
                        tokens,
                        query_heads,
                        kv_heads,
                        head_size};
    const int pieces = (query_heads + 2 * kv_heads) * (head_size / (2 * kPiece));
    return launch(rotary_kernel, dim3((pieces + kThreads - 1) / kThreads, tokens), kThreads, stream, rotary);
}
