// From score keys to the list of cache slots that each selecting head of a sparse item attends to.
//
// The scoring kernel left two thresholds around the M-th best key.  Every block reads its share of the keys once: keys
// above the upper threshold are listed, keys between the two are collected with their positions.  The block that
// finishes last for a head picks the best of the collected ones: higher key, then lower position.  Counts are exact:
// should the thresholds, which come from a sample, not enclose the M-th key, the last block goes through all keys.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kThreads = 256;
constexpr int kKeysPerThread = kSelectTokens / kThreads;
constexpr uint32_t kFixedKey = 65535;
constexpr int kCounters = 2048;
constexpr int kMaxTies = 1024;

struct Shared {
    int page[kSelectTokens / 16];
    uint32_t scan[33];
    uint32_t listed, collected;
    uint32_t last;
    uint32_t counter[kCounters];
    uint32_t tie[kMaxTies];
    uint32_t ties, found, above;
};

struct Head {
    const uint16_t* keys;
    SelectionState* state;
    uint64_t* collected;
    int32_t* slots;
};

// Append to the list at `place`, if the list has room for it.
__device__ __forceinline__ void list(const Arguments& a, const Head& head, uint32_t place, int page, int position) {
    const int slot = (page << a.page_shift) + (position & (a.p.page_size - 1));
    if (place < static_cast<uint32_t>(a.list_stride)) head.slots[place] = slot;
}

// The highest counter whose sum with all above it reaches `wanted`: shared.found; the sum above it: shared.above.
__device__ void find_counter(Shared& shared, uint32_t wanted) {
    constexpr int kOwn = kCounters / kThreads;
    const int top = kCounters - 1 - static_cast<int>(threadIdx.x) * kOwn;
    uint32_t sum = 0;
    for (int i = 0; i < kOwn; i++) sum += shared.counter[top - i];
    uint32_t total, before = exclusive_scan(sum, shared.scan, total);
    if (before < wanted && before + sum >= wanted) {
        int i = 0;
        while (before + shared.counter[top - i] < wanted) before += shared.counter[top - i++];
        shared.found = top - i;
        shared.above = before;
    }
    __syncthreads();
}

// List the best `wanted` of the collected tokens; false, with nothing listed, where they cannot be told apart here.
__device__ bool pick_collected(const Arguments& a, const Item& item, const Head& head, Shared& shared, uint32_t wanted,
                               uint32_t collected, uint32_t lowest_key, uint32_t span, uint32_t listed) {
    if (collected > kCollectCapacity || span > kCounters) return false;
    for (int i = threadIdx.x; i < kCounters; i += kThreads) shared.counter[i] = 0;
    if (threadIdx.x == 0) shared.ties = 0, shared.listed = listed;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < collected; i += kThreads) {
        atomicAdd(&shared.counter[static_cast<uint32_t>(__ldcg(head.collected + i) >> 32) - lowest_key], 1u);
    }
    __syncthreads();
    find_counter(shared, wanted);
    const uint32_t key = lowest_key + shared.found, ties = shared.counter[shared.found];
    if (ties > kMaxTies) return false;
    for (uint32_t i = threadIdx.x; i < collected; i += kThreads) {
        const uint64_t word = __ldcg(head.collected + i);
        const uint32_t own_key = word >> 32;
        if (own_key > key) {
            const int position = ~static_cast<uint32_t>(word);
            list(a, head, atomicAdd(&shared.listed, 1u), read_page(a, item.row, position), position);
        } else if (own_key == key) {
            shared.tie[atomicAdd(&shared.ties, 1u)] = static_cast<uint32_t>(word);
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < ties; i += kThreads) {
        const uint32_t word = shared.tie[i];  // negated position: the greater the better
        uint32_t better = 0;
        for (uint32_t j = 0; j < ties; j++) better += shared.tie[j] > word;
        if (better < wanted - shared.above) {
            list(a, head, atomicAdd(&shared.listed, 1u), read_page(a, item.row, ~word), ~word);
        }
    }
    return true;
}

// The whole list from the keys themselves, in order of position: where nearly all scores tie, or a sample misled.
__device__ uint32_t list_by_scanning(const Arguments& a, const Item& item, const Head& head, Shared& shared,
                                     uint32_t budget, int begin) {
    // The M-th key: its upper 11 bits, then its lower ones.
    uint32_t threshold = 0, above = 0;
    for (int level = 0; level < 2; level++) {
        for (int i = threadIdx.x; i < kCounters; i += kThreads) shared.counter[i] = 0;
        __syncthreads();
        for (int p = begin + threadIdx.x; p < item.length; p += kThreads) {
            const uint32_t key = __ldcg(head.keys + p);
            if (key == 0 || key == kFixedKey) continue;
            if (level == 0) atomicAdd(&shared.counter[key >> kFineBits], 1u);
            if (level == 1 && key >> kFineBits == threshold)
                atomicAdd(&shared.counter[key & ((1 << kFineBits) - 1)], 1u);
        }
        __syncthreads();
        find_counter(shared, budget - above);
        above += shared.above;
        threshold = (level == 0 ? 0 : threshold << kFineBits) + shared.found;
        __syncthreads();
    }
    uint32_t ties_left = budget - above, listed = 0;
    for (int base = begin; base < item.length; base += kThreads) {
        const int p = base + threadIdx.x;
        const uint32_t key = p < item.length ? __ldcg(head.keys + p) : 0;
        const bool tie = key == threshold;
        uint32_t total;
        const uint32_t rank = exclusive_scan(tie, shared.scan, total);
        const bool chosen = key > threshold || (tie && rank < ties_left);
        ties_left -= min(total, ties_left);
        const uint32_t place = exclusive_scan(chosen, shared.scan, total);
        if (chosen) list(a, head, listed + place, read_page(a, item.row, p), p);
        listed += total;
    }
    return listed;
}

__global__ __launch_bounds__(kThreads, 4) void select_kernel(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    wait_for_predecessor();
    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const Candidates candidates(a, item.length);
    const int begin = candidates.begin();
    const int blocks = (item.length - begin + kSelectTokens - 1) / kSelectTokens;
    if (static_cast<int>(blockIdx.x) >= blocks) return;
    const int first = begin + blockIdx.x * kSelectTokens;
    const int64_t index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    const Head head{a.score_key + index * a.key_stride, a.selection + index, a.collected + index * kCollectCapacity,
                    a.slot + index * a.list_stride};

    constexpr int kVectors = kKeysPerThread / 8;
    uint4 raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
        const int p = first + (v * kThreads + threadIdx.x) * 8;
        raw[v] = p < item.length ? __ldcg(reinterpret_cast<const uint4*>(head.keys + p)) : make_uint4(0, 0, 0, 0);
    }
    for (int i = threadIdx.x; i < kSelectTokens >> a.page_shift; i += kThreads) {
        shared.page[i] = read_page(a, item.row, first + (i << a.page_shift));
    }
    // Keys of at least `sure` are listed, those of at least `least` collected.  A key of 0 is no token.
    const uint32_t budget = attended_budget(a, item.length), among = candidates.count();
    const bool all = among <= budget;
    const uint32_t sure = all ? 1 : min((head.state->sure_bin + 1) << kFineBits, kFixedKey);
    const uint32_t least = all ? 1 : max(1u, min(head.state->least_bin << kFineBits, kFixedKey));
    uint64_t listing = 0, collecting = 0;  // a bit a key
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
        const uint32_t words[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
        uint32_t own_listing = 0, own_collecting = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t key = i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
            own_listing |= static_cast<uint32_t>(key >= sure) << i;
            own_collecting |= static_cast<uint32_t>(key >= least) << i;
        }
        listing |= static_cast<uint64_t>(own_listing) << (v * 8);
        collecting |= static_cast<uint64_t>(own_collecting) << (v * 8);
    }
    static_assert(kKeysPerThread <= 64, "a bit a key");
    collecting &= ~listing;
    uint32_t total;
    const uint32_t before = exclusive_scan(__popcll(listing) | __popcll(collecting) << 16, shared.scan, total);
    if (threadIdx.x == 0 && (total & 0xffff)) shared.listed = atomicAdd(&head.state->listed, total & 0xffff);
    if (threadIdx.x == 32 && total >> 16) shared.collected = atomicAdd(&head.state->collected, total >> 16);
    __syncthreads();
    uint32_t list_place = shared.listed + (before & 0xffff), collect_place = shared.collected + (before >> 16);
    for (; listing; listing &= listing - 1) {
        const int bit = __ffsll(listing) - 1;
        const int offset = ((bit >> 3) * kThreads + threadIdx.x) * 8 + (bit & 7);
        list(a, head, list_place++, shared.page[offset >> a.page_shift], first + offset);
    }
    for (; collecting; collecting &= collecting - 1) {
        const int bit = __ffsll(collecting) - 1;
        const int p = first + ((bit >> 3) * kThreads + threadIdx.x) * 8 + (bit & 7);
        if (collect_place < kCollectCapacity) {
            head.collected[collect_place] =
                static_cast<uint64_t>(__ldcg(head.keys + p)) << 32 | ~static_cast<uint32_t>(p);
        }
        collect_place++;
    }
    // The last block of this head completes the list.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.last = atomicAdd(&head.state->finished, 1u) == static_cast<uint32_t>(blocks - 1);
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    const uint32_t listed = __ldcg(&head.state->listed), collected = __ldcg(&head.state->collected);
    const uint32_t fixed = item.length - candidates.visible - among;
    uint32_t finished = listed;
    if (!all && budget > 0) {
        finished = fixed + budget;
        const bool enclosed = listed <= finished && listed + collected >= finished;
        const uint32_t wanted = finished - listed;
        if (!enclosed ||
            (wanted > 0 && !pick_collected(a, item, head, shared, wanted, collected, least, sure - least, listed))) {
            finished = list_by_scanning(a, item, head, shared, budget, begin);
        }
    }
    if (threadIdx.x == 0) head.state->total = min(finished, static_cast<uint32_t>(a.list_stride));
}

}  // namespace

cudaError_t launch_select(const Arguments& a, cudaStream_t stream) {
    const int blocks = (a.max_length + kSelectTokens - 1) / kSelectTokens;
    const Launch launch(dim3(blocks, a.select_heads, a.items), dim3(kThreads), 0, stream, a.dependent_launch);
    return launch(select_kernel, a);
}

}  // namespace socket_trt
