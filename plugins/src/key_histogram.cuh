// Score keys as selection sees them: the bins that order them, and the search for the bin in which a budget ends.
#ifndef SOCKET_TRT_KEY_HISTOGRAM_CUH_
#define SOCKET_TRT_KEY_HISTOGRAM_CUH_

#include "device.cuh"

namespace socket_trt {

constexpr int kBins = 16384;  // a key is the upper 14 of a positive float16's 15 bits
constexpr int kCoarse = 128, kFine = kBins / kCoarse;

__device__ __forceinline__ uint32_t bin_of(uint32_t key) {
    return key >> 1 & (kBins - 1);
}
// The least key of a bin, twice: what keys_from compares with.
__device__ __forceinline__ uint32_t bound_of(uint32_t bin) {
    return bin << 1 | bin << 17;
}

// Of eight keys, the bits of those that are at least `bound`; all are float16 numbers and positive.
__device__ __forceinline__ uint32_t keys_from(const uint4& keys, uint32_t bound) {
    const auto mask = [&](uint32_t pair) {
        return __hge2_mask(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&bound));
    };
    const uint32_t bits = (mask(keys.x) & 0x00020001u) | (mask(keys.y) & 0x00080004u) | (mask(keys.z) & 0x00200010u) |
                          (mask(keys.w) & 0x00800040u);
    return (bits | bits >> 16) & 0xff;
}
// The bin of the i-th of eight keys.
__device__ __forceinline__ uint32_t bin_in(const uint4& keys, int i) {
    const uint32_t front = i & 2 ? keys.y : keys.x, back = i & 2 ? keys.w : keys.z;
    const uint32_t word = i & 4 ? back : front;
    return bin_of(i & 1 ? word >> 16 : word);
}
// Of eight positions from `at` on, the bits of those in [first, last).
__device__ __forceinline__ uint32_t bits_between(int at, int first, int last) {
    return 0xffu << clamp(first - at, 0, 8) & 0xffu >> clamp(at + 8 - last, 0, 8);
}

// Where a budget ends.
struct Found {
    uint32_t bin;
    uint32_t above;         // keys in higher bins
    uint32_t above_before;  // of them, those of the blocks before this one
    uint32_t ties_before;   // those blocks' keys in the bin itself
    uint32_t enclosed;      // 0: all keys that were counted are fewer than the budget
};

// One warp's search in the blocks' 128 counters each, from the highest on, for that in which the `wanted`-th key lies.
// counters(b, i): those of block b, as vectors of four that the lane reads one of.
template <typename Counters>
__device__ Found find_bin(int blocks, int block, uint32_t wanted, Counters counters) {
    static_assert(kCoarse == 128 && kFine == 128, "four counters a lane");
    const int lane = threadIdx.x & 31;
    uint32_t all[4] = {}, before[4] = {};  // the highest first
#pragma unroll 8
    for (int other = 0; other < blocks; other++) {
        const uint4 x = counters(other, 31 - lane);
        const uint32_t own[4] = {x.w, x.z, x.y, x.x};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            all[i] += own[i];
            before[i] += other < block ? own[i] : 0;
        }
    }
    const uint32_t sum = all[0] + all[1] + all[2] + all[3];
    const uint32_t sum_before = before[0] + before[1] + before[2] + before[3];
    Found mine{127u - lane * 4, inclusive_warp_sum(sum) - sum, inclusive_warp_sum(sum_before) - sum_before, before[0],
               1};
    const uint32_t reached = __ballot_sync(~0u, mine.above + sum >= wanted);
#pragma unroll
    for (int i = 0; i < 3; i++) {
        if (mine.bin != 127u - lane * 4 - i || mine.above + all[i] >= wanted) continue;
        mine.bin--;
        mine.above += all[i];
        mine.above_before += before[i];
        mine.ties_before = before[i + 1];
    }
    const int owner = reached ? __ffs(reached) - 1 : 0;
    return Found{__shfl_sync(~0u, mine.bin, owner), __shfl_sync(~0u, mine.above, owner),
                 __shfl_sync(~0u, mine.above_before, owner), __shfl_sync(~0u, mine.ties_before, owner), reached != 0};
}

// Of 512 threads, each four's sum of 128 bins: the (threadIdx.x / 4)-th.
__device__ __forceinline__ uint32_t sum_of_bins(const uint32_t* count) {
    static_assert(kFine == 4 * 32, "32 bins a thread");
    const uint4* from = reinterpret_cast<const uint4*>(count) + threadIdx.x * 8;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 x = from[(i + threadIdx.x) & 7];  // turned, against bank conflicts
        sum += x.x + x.y + x.z + x.w;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    return sum + __shfl_xor_sync(~0u, sum, 2);
}

// Where in the list a warp's next token goes, and how many it may still take of those at the threshold.
struct Progress {
    uint32_t place, ties_left;

    // Take up to 32 tokens in order of position, one a lane: its place in the list, or -1.  All lanes must call it.
    __device__ __forceinline__ int take(bool exists, uint32_t bin, uint32_t threshold) {
        const uint32_t below = (1u << (threadIdx.x & 31)) - 1;  // lanes before this one
        const uint32_t tied = __ballot_sync(~0u, exists && bin == threshold);
        const bool first_tied = exists && bin == threshold && __popc(tied & below) < ties_left;
        const bool taken = (exists && bin > threshold) || first_tied;
        const uint32_t all = __ballot_sync(~0u, taken);
        const int own = taken ? static_cast<int>(place + __popc(all & below)) : -1;
        place += __popc(all);
        ties_left -= min(ties_left, static_cast<uint32_t>(__popc(tied)));
        return own;
    }
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_KEY_HISTOGRAM_CUH_
