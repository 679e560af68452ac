// Selection in decode_fused.cu: from what a group has collected of a head to a block's part of the list of cache slots.
#ifndef SOCKET_TRT_FUSED_SELECT_CUH_
#define SOCKET_TRT_FUSED_SELECT_CUH_

#include "fused_group.cuh"

namespace socket_trt {
namespace fused {

// What was collected of a head, as segments by position: in shared memory if it fits, else where it was written.
struct Collected {
    const uint32_t* row;
    const uint2* segment;  // [segments + 1]: number of the first key, and of the first token
    uint32_t* held;        // nullptr: too many
    int own_segments;      // of a warp

    // use(exists, key and offset, the offsets' origin) for all that a warp's segments hold, in order.
    template <typename Use>
    __device__ __forceinline__ void for_each(Use use) const {
        const int first = (threadIdx.x >> 5) * own_segments;
        for (int s = first; s < first + own_segments; s++) {
            const uint2 from = segment[s];
            const uint32_t count = segment[s + 1].x - from.x;
            for (uint32_t i = 0; i < count; i += 32) {
                const uint32_t own = i + (threadIdx.x & 31);
                uint32_t entry = 0;
                if (own < count) entry = held != nullptr ? held[from.x + own] : __ldcg(row + from.y + own);
                use(own < count, entry, from.y);
            }
        }
    }

    // Count the keys, and hold them.
    __device__ void load(uint32_t* count) const {
        constexpr int kAtOnce = 16;
        const int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * own_segments;
        for (int base = 0; base < own_segments; base += kAtOnce) {
            const int existing = min(kAtOnce, own_segments - base);
            const uint2* own = segment + first + base;
            const uint32_t longest = __reduce_max_sync(~0u, lane < existing ? own[lane + 1].x - own[lane].x : 0);
            for (uint32_t i = lane; i - lane < longest; i += 32) {
                uint32_t entry[kAtOnce], exists = 0;
#pragma unroll
                for (int s = 0; s < kAtOnce; s++) {  // all loads before anything waits for one
                    if (s < existing && i < own[s + 1].x - own[s].x) {
                        exists |= 1u << s;
                        entry[s] = __ldcg(row + own[s].y + i);
                    }
                }
#pragma unroll
                for (int s = 0; s < kAtOnce; s++) {
                    if (exists >> s & 1) {
                        atomicAdd(count + (entry[s] >> kOffsetBits), 1u);
                        if (held != nullptr) held[own[s].x + i] = entry[s];
                    }
                }
            }
        }
    }
};

// The bin in which the budget ends, into control: all threads call it.
__device__ inline void find_threshold(const uint32_t* count, uint32_t* coarse, uint32_t budget, Control& control) {
    const uint32_t sum = sum_of_bins(count);
    if ((threadIdx.x & 3) == 0) coarse[threadIdx.x >> 2] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        const Found high =
            find_bin(1, 0, budget, [&](int, int vector) { return reinterpret_cast<const uint4*>(coarse)[vector]; });
        const uint4* fine = reinterpret_cast<const uint4*>(count + high.bin * kFine);
        const Found low = find_bin(1, 0, budget - high.above, [&](int, int vector) { return fine[vector]; });
        if (threadIdx.x == 0) {
            control.threshold = high.bin * kFine + low.bin;
            control.above = high.above + low.above;
        }
    }
    __syncthreads();
}

// Positions of the chosen tokens whose places in the list are [from, until), to list[place - from].
__device__ inline void list_chosen(const Arguments& a, const Work& w, int head, uint32_t own_count, char* shared,
                                   Control& control, uint32_t from, uint32_t until, int32_t* list) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, segments = w.segments();
    uint2* segment = reinterpret_cast<uint2*>(shared + kSegmentsAt);
    uint32_t total;
    const uint32_t before = exclusive_scan(own_count, control.scan, total);
    if (threadIdx.x < segments) {
        const int first = w.first_unit(threadIdx.x / kWarps, threadIdx.x % kWarps) * kUnit;
        segment[threadIdx.x] = make_uint2(before, first);
    }
    if (threadIdx.x == 0) segment[segments] = make_uint2(total, 0);
    __syncthreads();
    uint32_t* count = reinterpret_cast<uint32_t*>(shared + kCountAt);
    uint32_t* held = total <= kMostHeld ? reinterpret_cast<uint32_t*>(shared + kHeldAt) : nullptr;
    const Collected collected{w.candidate_row(a, head), segment, held, w.blocks};
    collected.load(count);
    __syncthreads();
    const uint32_t budget = w.budget;
    find_threshold(count, reinterpret_cast<uint32_t*>(shared + kCoarseAt), budget, control);

    // What lies before a warp's tokens, and then their own places.
    const uint32_t threshold = control.threshold, ties = budget - control.above;
    uint32_t above = 0, tied = 0;
    collected.for_each([&](bool exists, uint32_t entry, uint32_t) {
        above += exists && entry >> kOffsetBits > threshold;
        tied += exists && entry >> kOffsetBits == threshold;
    });
    above = __reduce_add_sync(~0u, above);
    tied = __reduce_add_sync(~0u, tied);
    if (lane == 0) control.warp_count[0][warp] = above, control.warp_count[1][warp] = tied;
    __syncthreads();
    const uint32_t above_before = __reduce_add_sync(~0u, lane < warp ? control.warp_count[0][lane] : 0);
    const uint32_t tied_before = min(ties, __reduce_add_sync(~0u, lane < warp ? control.warp_count[1][lane] : 0));
    Progress progress{w.fixed_before + above_before + tied_before, ties - tied_before};
    if (progress.place >= until || progress.place + above + min(tied, progress.ties_left) <= from) return;
    collected.for_each([&](bool exists, uint32_t entry, uint32_t origin) {
        const uint32_t place = progress.take(exists, entry >> kOffsetBits, threshold);
        if (place >= from && place < until) {
            list[place - from] = w.begin + static_cast<int>(origin + (entry & kOffsets));
        }
    });
}

// Positions of the tokens that are always attended, likewise; then positions become cache slots, in list and in
// `slots`.
__device__ inline void list_slots(const Arguments& a, const Work& w, uint32_t from, uint32_t until, int32_t* list,
                                  int32_t* slots) {
    constexpr int kAtOnce = 4;
    for (uint32_t place = from + threadIdx.x; place < until; place += kThreads) {
        if (place < w.fixed_before) {
            list[place - from] = w.visible + place;
        } else if (place >= w.fixed_before + w.budget) {
            list[place - from] = w.last + (place - w.fixed_before - w.budget);
        }
    }
    __syncthreads();
    const uint32_t count = until - from;
    for (uint32_t base = threadIdx.x; base < count; base += kAtOnce * kThreads) {
        int slot[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const uint32_t own = base + i * kThreads;
            // Stages that are run apart may leave a list with holes: it is looked at defensively.
            const int position = own < count ? clamp(list[own], 0, w.item.length - 1) : 0;
            slot[i] = (read_page(a, w.item.row, position) << a.page_shift) + (position & (a.p.page_size - 1));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const uint32_t own = base + i * kThreads;
            if (own < count) list[own] = slots[from + own] = slot[i];
        }
    }
    __syncthreads();
}

}  // namespace fused
}  // namespace socket_trt

#endif  // SOCKET_TRT_FUSED_SELECT_CUH_
