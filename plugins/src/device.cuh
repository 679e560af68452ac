// Device helpers that the kernels share: rows and pages read defensively, conversions, scans.
#ifndef SOCKET_TRT_DEVICE_CUH_
#define SOCKET_TRT_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arguments.h"

namespace socket_trt {

__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two elements of a word.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// A place in shared memory, as instructions name it.
__device__ __forceinline__ uint32_t shared_address(const void* place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}
__device__ __forceinline__ uint4 load_piece(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address));
    return x;
}

// Asynchronous copies of 16 or 4 bytes into shared memory, in groups that each thread ends by itself.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, uint64_t cache_policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "l"(cache_policy));
}
__device__ __forceinline__ void copy_4_bytes(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait for all groups but the last LEFT.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// What a copy may ask of the L2 cache: to let go of the data before others, as what is read only once; or nothing.
__device__ __forceinline__ uint64_t read_once_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t usual_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Kernels of one call overlap: each begins while the one before it still runs, and waits here before it looks at
// anything that an earlier kernel of the call writes.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin as soon as all blocks have come here or have ended.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int clamp(int x, int low, int high) {
    return min(max(x, low), high);
}

// The tokens of one sequence, brought into range whatever the device arrays hold.
struct Row {
    int first, count;  // in the packed step
    int past;
};

__device__ __forceinline__ Row read_row(const Arguments& a, int row) {
    Row r;
    r.first = clamp(a.p.query_start[row], 0, a.p.tokens);
    r.count = clamp(a.p.query_start[row + 1], r.first, a.p.tokens) - r.first;
    r.past = clamp(a.p.past_length[row], 0, a.max_length);
    return r;
}

// Describe item `index` of the step.
__device__ __forceinline__ Item read_item(const Arguments& a, int index) {
    Item item{index, index, 0, kItemNone};
    Row r = read_row(a, index);  // where every sequence has a token, an item is of the row of the same number
    if (a.items_are_tokens) {
        for (int row = 0; index < r.first || index >= r.first + r.count; row++) {
            if (row == a.p.sequences) return Item{-1, index, 0, kItemNone};
            r = read_row(a, row);
            item.row = row;
        }
    } else if (r.count == 1) {
        item.token = r.first;
    } else {
        return item;
    }
    item.length = min(r.past + item.token - r.first + 1, a.max_length);
    item.mode = r.count == 1 && a.sparse && item.length > a.p.min_length ? kItemSparse : kItemDense;
    return item;
}

// A page number, or the null page where the table holds nonsense.
__device__ __forceinline__ uint32_t valid_page(const Arguments& a, uint32_t page) {
    return page < static_cast<uint32_t>(a.p.pages) ? page : 0;
}
// Page that holds `position` of sequence `row`.
__device__ __forceinline__ int read_page(const Arguments& a, int row, int position) {
    if (position >= a.max_length) return 0;
    return valid_page(a,
                      a.p.page_table[static_cast<int64_t>(row) * a.p.pages_per_sequence + (position >> a.page_shift)]);
}
// Slot (page * page_size + place in the page) of `position`, which lies in `page`.
__device__ __forceinline__ int slot_in_page(const Arguments& a, int page, int position) {
    return (page << a.page_shift) + (position & (a.p.page_size - 1));
}

// Index of a slot (page * page_size + place in the page; of 32 or 64 bits) of `head` in a cache that has one element a
// token.
template <typename Slot>
__device__ __forceinline__ int64_t cache_index(const Arguments& a, Slot slot, int head) {
    const int64_t page_head = static_cast<int64_t>(slot >> a.page_shift) * a.p.kv_heads + head;
    return (page_head << a.page_shift) + (slot & (a.p.page_size - 1));
}

// Positions that a decode query may choose among, and those that it always attends to.
struct Candidates {
    int visible;      // first position inside the sliding window
    int first, last;  // chosen among [first, last)

    __device__ __forceinline__ Candidates(const Arguments& a, int length) {
        visible = a.p.sliding_window > 0 ? max(0, length - a.p.sliding_window) : 0;
        first = max(a.p.sink, visible);
        last = length - min(a.p.window, length);
    }
    __device__ __forceinline__ int count() const { return max(0, last - first); }
    // First position whose key the scoring kernel writes: whole units, so that 16-byte pieces stay inside pages.
    __device__ __forceinline__ int begin() const { return first / kScoreUnit * kScoreUnit; }
};

// M = max(budget_tokens, ceil(length * budget_permille / 1000)).
__device__ __forceinline__ int attended_budget(const Arguments& a, int length) {
    const int64_t share = (static_cast<int64_t>(length) * a.p.budget_permille + 999) / 1000;
    return max(a.p.budget_tokens, static_cast<int>(share));
}

// Sum over the warp's lanes up to this one.
__device__ __forceinline__ uint32_t inclusive_warp_sum(uint32_t value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(~0u, value, step);
        if ((threadIdx.x & 31) >= step) value += below;
    }
    return value;
}

// Sum over the threads before this one, and the block's total; `scratch` holds 33 words.  All threads must call it.
__device__ __forceinline__ uint32_t exclusive_scan(uint32_t value, uint32_t* scratch, uint32_t& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const uint32_t sum = inclusive_warp_sum(value);
    __syncthreads();  // scratch may still be read from a scan before
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        const uint32_t own = lane < warps ? scratch[lane] : 0, part = inclusive_warp_sum(own);
        scratch[lane] = part - own;
        if (lane == 31) scratch[32] = part;
    }
    __syncthreads();
    total = scratch[32];
    return scratch[warp] + sum - value;
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_DEVICE_CUH_
