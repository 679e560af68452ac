// Attention of one query head to a list of cache slots, by one block.
//
// A lane reads eight elements of a row, so that a warp's instruction reads two keys of 128 elements, or four of 64.
// Every warp has a ring of tiles in shared memory, filled by asynchronous copies.  A lane looks at no bytes but those
// that it has copied itself: nothing has to be waited for but its own copies.
#ifndef SOCKET_TRT_ATTEND_LIST_CUH_
#define SOCKET_TRT_ATTEND_LIST_CUH_

#include "async_copy.cuh"
#include "combine_parts.cuh"

namespace socket_trt {

constexpr int kAttendWarps = 16;
constexpr int kAttendTiles = 3;         // of a warp's ring
constexpr int kAttendTileBytes = 4096;  // keys, then values
constexpr int kAttendRingBytes = kAttendWarps * kAttendTiles * kAttendTileBytes;
constexpr int kMostHeadSize = 128;

// What the warps have found, in shared memory: weighted sums of values, and maximum (base 2) and sum of the weights.
struct WarpSums {
    float output[kAttendWarps][kMostHeadSize];
    float2 stats[kAttendWarps];
};

__device__ __forceinline__ void unpack(float (&to)[8], const uint4& from, __half) {
    const uint32_t word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i]));
        to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void unpack(float (&to)[8], const uint4& from, __nv_bfloat16) {
    const uint32_t word[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(word[i] << 16), to[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
}

// query: the head's D elements; list: `count` slots, in shared or global memory; ring: kAttendRingBytes of shared
// memory.
template <typename T, int HEAD_SIZE>
__device__ void attend_list(const Arguments& a, const T* query, int kv_head, const int32_t* list, uint32_t count,
                            char* ring, WarpSums& sums) {
    constexpr int kLanes = HEAD_SIZE / 8;       // that share a row
    constexpr int kRows = 32 / kLanes;          // rows that a warp's instruction reads
    constexpr int kRowsBytes = 512;             // and their bytes
    constexpr int kOwn = 4;                     // rows of a tile that a lane has a piece of
    constexpr int kTile = kOwn * kRows;         // tokens
    constexpr int kValues = kOwn * kRowsBytes;  // where a tile's values begin
    static_assert(2 * kValues == kAttendTileBytes && HEAD_SIZE <= kMostHeadSize, "");
    constexpr float kLog2E = 1.4426950408889634f;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane / kLanes, piece = lane % kLanes;
    // At most 2^27 tokens.
    const uint32_t first = count * warp / kAttendWarps, last = count * (warp + 1) / kAttendWarps;
    const char* own = ring + warp * kAttendTiles * kAttendTileBytes + lane * 16;
    const uint32_t own_address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
    const T* keys = static_cast<const T*>(a.p.key_cache) + piece * 8;
    const T* values = static_cast<const T*>(a.p.value_cache) + piece * 8;

    const auto copy = [&](int tile, uint32_t from) {
        if (from < last) {
#pragma unroll
            for (int i = 0; i < kOwn; i++) {
                const uint32_t at = from + i * kRows + row;
                const bool exists = at < last;
                const int slot = exists ? list[at] : 0;
                const int64_t page_head = static_cast<int64_t>(slot >> a.page_shift) * a.p.kv_heads + kv_head;
                const int64_t offset = ((page_head << a.page_shift) + (slot & (a.p.page_size - 1))) * HEAD_SIZE;
                const uint32_t to = own_address + tile * kAttendTileBytes + i * kRowsBytes;
                copy_or_clear(to, keys + offset, exists);
                copy_or_clear(to + kValues, values + offset, exists);
            }
        }
        commit_copies();
    };
#pragma unroll
    for (int tile = 0; tile < kAttendTiles; tile++) copy(tile, first + tile * kTile);

    const float softcap = a.p.softcap, scale = softcap > 0.f ? a.p.scale : a.p.scale * kLog2E;
    float q[8];
    unpack(q, __ldg(reinterpret_cast<const uint4*>(query) + piece), T{});
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] *= scale;
    float maximum = -INFINITY, weights = 0.f, output[8] = {};
    const bool upper = lane & kLanes / 2, odd = lane & kLanes / 4;
    const uint32_t own_row = (upper * 2 + odd) * kRows + row;  // whose score this lane ends up with
    int tile = 0;
    for (uint32_t at = first; at < last; at += kTile) {
        wait_for_copies<kAttendTiles - 1>();
        const uint4* from = reinterpret_cast<const uint4*>(own + tile * kAttendTileBytes);
        float score[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            float k[8];
            unpack(k, from[i * kRowsBytes / 16], T{});
            score[i] = q[0] * k[0];
#pragma unroll
            for (int d = 1; d < 8; d++) score[i] = fmaf(q[d], k[d], score[i]);
        }
        // Sums over the row's lanes: each exchange halves the rows that a lane still adds up.
        const float low = (upper ? score[2] : score[0]) + __shfl_xor_sync(~0u, upper ? score[0] : score[2], kLanes / 2);
        const float high =
            (upper ? score[3] : score[1]) + __shfl_xor_sync(~0u, upper ? score[1] : score[3], kLanes / 2);
        float x = (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, kLanes / 4);
#pragma unroll
        for (int step = kLanes / 8; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
        if (softcap > 0.f) x = kLog2E * softcap * (1.f - 2.f / (exp2f(x * (2.f * kLog2E / softcap)) + 1.f));
        if (at + own_row >= last) x = -INFINITY;

        float new_maximum = fmaxf(maximum, x);
#pragma unroll
        for (int step = kLanes / 4; step < 32; step *= 2) {
            new_maximum = fmaxf(new_maximum, __shfl_xor_sync(~0u, new_maximum, step));
        }
        const float base = new_maximum == -INFINITY ? 0.f : new_maximum;  // where no score is a number
        const float factor = exp2f(maximum - base), weight = exp2f(x - base);
        maximum = new_maximum;
        weights = weights * factor + weight;
#pragma unroll
        for (int d = 0; d < 8; d++) output[d] *= factor;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            const float w = __shfl_sync(~0u, weight, row * kLanes + i * (kLanes / 4));
            float v[8];
            unpack(v, from[(kValues + i * kRowsBytes) / 16], T{});
#pragma unroll
            for (int d = 0; d < 8; d++) output[d] = fmaf(w, v[d], output[d]);
        }
        copy(tile, at + kAttendTiles * kTile);
        tile = tile + 1 == kAttendTiles ? 0 : tile + 1;
    }
#pragma unroll
    for (int step = kLanes / 4; step < 32; step *= 2) weights += __shfl_xor_sync(~0u, weights, step);
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
        for (int d = 0; d < 8; d++) output[d] += __shfl_xor_sync(~0u, output[d], step);
    }
    if (row == 0) {
        float4* to = reinterpret_cast<float4*>(sums.output[warp] + piece * 8);
        to[0] = make_float4(output[0], output[1], output[2], output[3]);
        to[1] = make_float4(output[4], output[5], output[6], output[7]);
    }
    if (lane == 0) sums.stats[warp] = make_float2(maximum, weights);
}

// The block's sums of element `d`, once all warps have left theirs.
__device__ __forceinline__ Average combine_warps(const WarpSums& sums, int d) {
    return combine_parts(
        kAttendWarps, [&](int warp) { return sums.stats[warp]; }, [&](int warp) { return sums.output[warp][d]; });
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_ATTEND_LIST_CUH_
