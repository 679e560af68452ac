// From score keys to the list of cache slots that each selecting head of a sparse item attends to.
//
// A histogram of a sample of the keys gives two thresholds around the M-th best.  Every block reads its share: keys
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
    uint32_t sure_bin, least_bin;
};

struct Head {
    const uint16_t* keys;
    SelectionState* state;
    uint64_t* collected;
    int32_t* slots;
};

// From the histogram of every `rate`-th key: keys in bins above shared.sure_bin are fewer than the budget, keys in bins
// from shared.least_bin on are more, each but for a chance of five standard deviations.
__device__ void find_thresholds(const uint32_t* histogram, int rate, uint32_t budget, Shared& shared) {
    const float margin = 8.f + 5.f * sqrtf(static_cast<float>(budget) * (rate - 1));
    const float fewest = (budget - margin) / rate, most = (budget + margin) / rate;
    constexpr int kOwn = kHistogramBins / kThreads;
    static_assert(kOwn == 8, "two vectors of four bins");
    const int top = kHistogramBins - 1 - static_cast<int>(threadIdx.x) * kOwn;
    const uint4* from = reinterpret_cast<const uint4*>(histogram + top + 1 - kOwn);
    const uint4 lower = __ldcg(from), upper = __ldcg(from + 1);
    const uint32_t count[kOwn] = {upper.w, upper.z, upper.y, upper.x, lower.w, lower.z, lower.y, lower.x};
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i++) sum += count[i];
    if (threadIdx.x == 0) shared.sure_bin = shared.least_bin = 0;  // the scan's barriers lie between
    uint32_t total, before = exclusive_scan(sum, shared.scan, total);
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const uint32_t until = before + count[i];
        if (until > fewest && (before <= fewest || top - i == kHistogramBins - 1)) shared.sure_bin = top - i;
        if (until >= most && before < most) shared.least_bin = top - i;
        before = until;
    }
    __syncthreads();
}

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

// The thread's keys of one round: eight at a time.
struct Keys {
    static constexpr int kVectors = kKeysPerThread / 8;
    uint4 raw[kVectors];

    static __device__ __forceinline__ int offset(int bit) {
        return ((bit >> 3) * kThreads + static_cast<int>(threadIdx.x)) * 8 + (bit & 7);
    }
    __device__ __forceinline__ void load(const Head& head, int first, int length) {
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const int p = first + offset(v * 8);
            raw[v] = p < length ? __ldcg(reinterpret_cast<const uint4*>(head.keys + p)) : make_uint4(0, 0, 0, 0);
        }
    }
    // A bit for each key of at least `least`.
    __device__ __forceinline__ uint32_t at_least(uint32_t least) const {
        static_assert(kKeysPerThread <= 32, "a bit a key");
        uint32_t bits = 0;
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            const uint32_t words[4] = {raw[v].x, raw[v].y, raw[v].z, raw[v].w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t key = i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
                bits |= static_cast<uint32_t>(key >= least) << (v * 8 + i);
            }
        }
        return bits;
    }
};

__global__ __launch_bounds__(kThreads,
                             kSelectBlocksPerMultiprocessor) void select_kernel(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const Candidates candidates(a, item.length);
    const int begin = candidates.begin(), block_tokens = a.select_rounds * kSelectTokens;
    const int blocks = (item.length - begin + block_tokens - 1) / block_tokens;
    if (static_cast<int>(blockIdx.x) >= blocks) return;
    int first = begin + blockIdx.x * block_tokens;
    const int last = min(item.length, first + block_tokens);
    const int64_t index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    const Head head{a.score_key + index * a.key_stride, a.selection + index, a.collected + index * kCollectCapacity,
                    a.slot + index * a.list_stride};
    Keys keys;
    keys.load(head, first, last);

    // Keys of at least `sure` are listed, others of at least `least` collected.  A key of 0 is no token.
    const uint32_t budget = attended_budget(a, item.length), among = candidates.count();
    const bool all = among <= budget;
    uint32_t sure = 1, least = 1;
    if (!all && budget == 0) {
        sure = least = kFixedKey;
    } else if (!all) {
        find_thresholds(a.histogram + index * kHistogramBins, 4 / a.code_bytes, budget, shared);
        sure = min((shared.sure_bin + 1) << kFineBits, kFixedKey);
        least = max(1u, shared.least_bin << kFineBits);
    }
    for (; first < last; first += kSelectTokens) {
        const uint32_t listing = keys.at_least(sure), collecting = keys.at_least(least) & ~listing;
        const int round = first;
        if (first + kSelectTokens < last)
            keys.load(head, first + kSelectTokens, last);  // in flight until the next round
        for (int i = threadIdx.x; i < kSelectTokens >> a.page_shift; i += kThreads) {
            shared.page[i] = read_page(a, item.row, round + (i << a.page_shift));
        }
        uint32_t total;
        const uint32_t before = exclusive_scan(__popc(listing) | __popc(collecting) << 16, shared.scan, total);
        if (threadIdx.x == 0 && (total & 0xffff)) shared.listed = atomicAdd(&head.state->listed, total & 0xffff);
        if (threadIdx.x == 32 && total >> 16) shared.collected = atomicAdd(&head.state->collected, total >> 16);
        __syncthreads();
        uint32_t list_place = shared.listed + (before & 0xffff), collect_place = shared.collected + (before >> 16);
        for (uint32_t bits = listing; bits; bits &= bits - 1) {
            const int offset = Keys::offset(__ffs(bits) - 1);
            list(a, head, list_place++, shared.page[offset >> a.page_shift], round + offset);
        }
        for (uint32_t bits = collecting; bits; bits &= bits - 1) {
            const uint32_t p = round + Keys::offset(__ffs(bits) - 1);
            if (collect_place < kCollectCapacity) {
                head.collected[collect_place] = static_cast<uint64_t>(__ldcg(head.keys + p)) << 32 | ~p;
            }
            collect_place++;
        }
        __syncthreads();  // pages and places are overwritten in the next round
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
    const int block_tokens = a.select_rounds * kSelectTokens;
    const int blocks = (a.max_length + block_tokens - 1) / block_tokens;
    const Launch launch(dim3(blocks, a.select_heads, a.items), dim3(kThreads), 0, stream);
    return launch(select_kernel, a);
}

}  // namespace socket_trt
