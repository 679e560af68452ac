// From scores to the list of cache slots that one selecting head of a sparse item attends to: exactly the budget, in
// order of position, of equal scores those at lower positions.  select.cu has the kernel that only lists, and
// select_attend.cu the one that goes on to attend.
//
// A cluster of blocks shares the tokens of one head, and the warps of a block share its part.  Each warp collects the
// keys above a bound, which a sample of the row gives, and counts them in the block's histogram with a bin for every
// key. A look at all blocks' histograms, at sums of 128 bins and then at 128 bins, finds the key that the budget ends
// in, and how much of the list comes before a block's own part, which its warps then list.  Should the sample have
// misled, the keys below the bound are counted too.  Where there are no clusters (before compute capability 9.0) one
// block has a head for itself.
#ifndef SOCKET_TRT_SELECT_CUH_
#define SOCKET_TRT_SELECT_CUH_

#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace select {

constexpr int kThreads = 512;
constexpr int kBins = 16384;  // a key is the upper 14 of a positive float16's 15 bits
constexpr int kCoarse = 128, kFine = kBins / kCoarse;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;        // vectors of eight keys that a lane loads ahead
constexpr int kOffsetBits = 17;  // of a collected key's place
constexpr uint32_t kOffsets = (1u << kOffsetBits) - 1;
constexpr int kMaxBlocks = 8;       // of a cluster, on any GPU that has clusters
constexpr int kLeastTokens = 4096;  // of a block
constexpr int kMostSamples = 2048, kLeastSamples = 64;

// Where the budget ends.
struct Found {
    uint32_t bin;
    uint32_t above;         // keys in higher bins
    uint32_t above_before;  // of them, those of the blocks before this one
    uint32_t ties_before;   // those blocks' keys in the bin itself
    uint32_t enclosed;      // 0: all keys that were counted are fewer than the budget
};

struct Shared {
    uint32_t count[kBins];
    uint32_t coarse[kMaxBlocks][kCoarse];
    uint32_t warp_count[2][kWarps];
    uint32_t incomplete;
    Found found;
    uint32_t collected[1];  // [kWarps, capacity]: bin << kOffsetBits | place in the block's part of the row
};

// No block may look at another's shared memory before all have written it, nor leave while another may still look.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

#if __CUDA_ARCH__ >= 900
// Address of another block's shared memory, at the place where `here` is in this block's.
__device__ __forceinline__ uint32_t address_in_block(const void* here, int block) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(here));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
    return address;
}
#endif
__device__ __forceinline__ uint4 load_of_block(const uint4* words, int block) {
#if __CUDA_ARCH__ >= 900
    uint4 x;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address_in_block(words, block)));
    return x;
#else
    return *words;
#endif
}
__device__ __forceinline__ void store_to_block(uint32_t* word, int block, uint32_t value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in_block(word, block)), "r"(value) : "memory");
#else
    *word = value;
#endif
}

// One warp's search in the blocks' 128 counters each, from the highest on, for that in which the `wanted`-th key lies.
// counters(b): those of block b, as vectors of four that the lane reads one of.
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

// Both searches, of the first warp; the blocks' coarse counters lie in shared.coarse.
__device__ inline void find_threshold(Shared& shared, int blocks, int block, uint32_t wanted) {
    Found coarse = find_bin(blocks, block, wanted, [&](int other, int vector) {
        return reinterpret_cast<const uint4*>(shared.coarse[other])[vector];
    });
    if (coarse.enclosed) {
        const uint4* fine = reinterpret_cast<const uint4*>(shared.count + coarse.bin * kFine);
        const Found found = find_bin(blocks, block, wanted - coarse.above, [&](int other, int vector) {
            return blocks == 1 ? fine[vector] : load_of_block(fine + vector, other);
        });
        coarse = Found{coarse.bin * kFine + found.bin, coarse.above + found.above,
                       coarse.above_before + found.above_before, found.ties_before, 1};
    }
    if (threadIdx.x == 0) shared.found = coarse;
}

// Sums of 128 bins each, told to all blocks.
__device__ inline void sum_bins(Shared& shared, int blocks, int block) {
    static_assert(kThreads == 4 * kCoarse && kFine == 4 * 32, "four threads a sum, 32 bins a thread");
    const uint4* from = reinterpret_cast<const uint4*>(shared.count) + threadIdx.x * 8;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 x = from[(i + threadIdx.x) & 7];  // turned, against bank conflicts
        sum += x.x + x.y + x.z + x.w;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    for (int other = threadIdx.x & 3; other < blocks; other += 4) {
        uint32_t* to = &shared.coarse[block][threadIdx.x >> 2];
        if (blocks == 1) {
            *to = sum;
        } else {
            store_to_block(to, other, sum);
        }
    }
}

__device__ __forceinline__ uint32_t bin_of(uint32_t key) {
    return key >> 1 & (kBins - 1);
}

// The vectors of eight keys that a warp looks at, and which of their keys are candidates.
struct Part {
    const uint4* vectors;
    int origin;       // the block's first vector: places count from it
    int begin, end;   // vectors
    int first, last;  // candidates

    __device__ __forceinline__ uint32_t candidate_bits(int vector) const {
        uint32_t bits = 0xff;
        if (vector * 8 < first) bits &= 0xff << (first - vector * 8);
        if (vector * 8 + 8 > last) bits &= 0xff >> (vector * 8 + 8 - last);
        return bits;
    }
};

// Of eight keys, the bits of those that are at least `bound`; all are float16 numbers and positive.
__device__ __forceinline__ uint32_t keys_from(const uint4& keys, uint32_t bound) {
    const auto mask = [&](uint32_t pair) {
        return __hge2_mask(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&bound));
    };
    const uint32_t bits = (mask(keys.x) & 0x00020001u) | (mask(keys.y) & 0x00080004u) | (mask(keys.z) & 0x00200010u) |
                          (mask(keys.w) & 0x00800040u);
    return (bits | bits >> 16) & 0xff;
}

// Collect a warp's candidates in bins [least, most), in order; with `counted`, into the histogram too.  Returns their
// number, of which at most `capacity` are held.
__device__ inline uint32_t collect(const Part& part, uint32_t least, uint32_t most, bool counted, uint32_t* held,
                                   uint32_t capacity, Shared& shared) {
    const int lane = threadIdx.x & 31;
    const uint32_t low = least << 1 | least << 17, high = most << 1 | most << 17;
    uint32_t collected = 0;
    for (int base = part.begin; base < part.end; base += 32 * kAhead) {
        uint4 keys[kAhead];
#pragma unroll
        for (int v = 0; v < kAhead; v++) {
            const int at = base + v * 32 + lane;
            keys[v] = at < part.end ? __ldg(part.vectors + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int v = 0; v < kAhead; v++) {
            const int at = base + v * 32 + lane;
            uint32_t wanted = 0;
            if (at < part.end) {
                wanted = keys_from(keys[v], low) & part.candidate_bits(at);
                if (most < kBins) wanted &= ~keys_from(keys[v], high);
            }
            const uint32_t until = collected + inclusive_warp_sum(__popc(wanted));
            uint32_t place = until - __popc(wanted);
            for (; wanted; wanted &= wanted - 1) {
                const int i = __ffs(wanted) - 1;
                const uint32_t front = i & 2 ? keys[v].y : keys[v].x, back = i & 2 ? keys[v].w : keys[v].z;
                const uint32_t word = i & 4 ? back : front, bin = bin_of(i & 1 ? word >> 16 : word);
                const uint32_t offset = (at - part.origin) * 8 + i;
                if (counted) atomicAdd(&shared.count[bin], 1u);
                if (place < capacity) held[place++] = bin << kOffsetBits | (offset & kOffsets);
            }
            collected = __shfl_sync(~0u, until, 31);
        }
    }
    __syncwarp();
    return collected;
}

struct List {
    const Arguments& a;
    int row;
    int32_t* slots;

    __device__ __forceinline__ void put(uint32_t place, int position) const {
        const int slot = (read_page(a, row, position) << a.page_shift) + (position & (a.p.page_size - 1));
        if (place < static_cast<uint32_t>(a.list_stride)) slots[place] = slot;
    }
    // This block's part of the positions [first, last), from `place` on.
    __device__ void put_all(uint32_t place, int first, int last, int blocks, int block) const {
        for (int p = first + block * kThreads + threadIdx.x; p < last; p += blocks * kThreads)
            put(place + p - first, p);
    }
};

// How many of a warp's collected tokens are above the threshold (lower half) or at it (upper half).
__device__ inline uint32_t count_collected(const uint32_t* held, uint32_t count, uint32_t threshold) {
    uint32_t above = 0, tied = 0;
    for (uint32_t base = 0; base < count; base += 32) {
        const uint32_t own = base + (threadIdx.x & 31);
        const uint32_t bin = own < count ? held[own] >> kOffsetBits : 0;
        above += __popc(__ballot_sync(~0u, own < count && bin > threshold));
        tied += __popc(__ballot_sync(~0u, own < count && bin == threshold));
    }
    return above | tied << 16;
}

// Where a warp's next token goes, and how many it may still take of those at the threshold.
struct Progress {
    uint32_t place, ties_left;
};

// List a warp's collected tokens that are above the threshold or the first at it.
__device__ inline void put_collected(const List& list, int origin, const uint32_t* held, uint32_t count,
                                     uint32_t threshold, Progress& progress) {
    const uint32_t below = (1u << (threadIdx.x & 31)) - 1;  // lanes before this one
    for (uint32_t base = 0; base < count; base += 32) {
        const uint32_t own = base + (threadIdx.x & 31);
        const uint32_t entry = own < count ? held[own] : 0, bin = entry >> kOffsetBits;
        const uint32_t tied = __ballot_sync(~0u, own < count && bin == threshold);
        const bool first_tied = own < count && bin == threshold && __popc(tied & below) < progress.ties_left;
        const bool taken = own < count && (bin > threshold || first_tied);
        const uint32_t all = __ballot_sync(~0u, taken);
        if (taken) {
            list.put(progress.place + __popc(all & below), origin * 8 + static_cast<int>(entry & kOffsets));
        }
        progress.place += __popc(all);
        progress.ties_left -= min(progress.ties_left, __popc(tied));
    }
}

// Sum over the block of a number that all lanes of a warp share; `turn` counts the calls.
__device__ __forceinline__ uint32_t block_sum(uint32_t value, int turn, Shared& shared) {
    uint32_t* counts = shared.warp_count[turn & 1];
    if ((threadIdx.x & 31) == 0) counts[threadIdx.x >> 5] = value;
    __syncthreads();
    return __reduce_add_sync(~0u, (threadIdx.x & 31) < kWarps ? counts[threadIdx.x & 31] : 0);
}

// A bin that very likely holds, with all above it, at least the budget of a row's keys, and not many more.  All threads
// must call it.
__device__ inline uint32_t sample_bound(const uint16_t* samples, int first, int last, uint32_t among, uint32_t budget,
                                        Shared& shared) {
    const int from = (first + kSampleTokens - 1) / kSampleTokens, exist = last / kSampleTokens - from;
    if (exist < kLeastSamples) return 0;
    constexpr int kOwn = kMostSamples / kThreads;
    const int taken = min(exist, kMostSamples);
    const float step = static_cast<float>(exist) / taken;
    uint32_t bin[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const int sample = i * kThreads + threadIdx.x;
        bin[i] = sample < taken ? bin_of(__ldg(samples + from + static_cast<int>(sample * step))) : 0;
    }
    // Four standard deviations more than the budget's share of the sample.
    const float share = static_cast<float>(budget) / among * taken;
    const uint32_t wanted = static_cast<uint32_t>(share + 4.f * sqrtf(share)) + 4;
    uint32_t bound = 0;
    constexpr int kLowest = 2;  // finer bits are not worth their time
#pragma unroll 1
    for (int bit = kBins / 2, turn = 0; bit >= 1 << kLowest; bit /= 2, turn++) {
        uint32_t count = 0;
#pragma unroll
        for (int i = 0; i < kOwn; i++) count += __popc(__ballot_sync(~0u, bin[i] >= bound + bit));
        if (block_sum(count, turn, shared) >= wanted) bound += bit;
    }
    return bound;
}

// List the slots of head `index` of all items' selecting heads, this block its part of them, and return their number.
// All blocks of the cluster must call it, and none looks at another's shared memory after it.
__device__ inline int select_slots(const Arguments& a, const Item& item, int64_t index, Shared& shared) {
    const int blocks = gridDim.x, block = blockIdx.x;
    const Candidates candidates(a, item.length);
    const int first = min(candidates.first, item.length), last = max(candidates.last, first);
    const uint32_t budget = attended_budget(a, item.length), among = last - first;
    const List list{a, item.row, a.slot + index * a.list_stride};
    if (among <= budget) {
        list.put_all(0, candidates.visible, item.length, blocks, block);
        return min(item.length - candidates.visible, a.list_stride);
    }
    const uint32_t fixed_before = first - candidates.visible, fixed = fixed_before + item.length - last;
    const int listed = min(fixed + budget, static_cast<uint32_t>(a.list_stride));
    const auto list_fixed = [&] {
        list.put_all(0, candidates.visible, first, blocks, block);
        list.put_all(fixed_before + budget, last, item.length, blocks, block);
    };
    if (budget == 0) {
        list_fixed();
        return listed;
    }
    __syncthreads();  // the histogram is zero

    const uint16_t* row = a.score_key + index * a.key_stride;
    const int first_vector = first / 8, last_vector = (last + 7) / 8, warp = threadIdx.x >> 5;
    const int share = ((last_vector - first_vector + blocks - 1) / blocks + kWarps - 1) / kWarps;  // a warp's
    Part part{reinterpret_cast<const uint4*>(row), 0, 0, 0, first, last};
    part.origin = min(last_vector, first_vector + block * share * kWarps);
    part.begin = min(last_vector, part.origin + warp * share);
    part.end = min(last_vector, part.begin + share);
    const uint32_t capacity = a.select_capacity / kWarps;
    uint32_t* held = shared.collected + warp * capacity;
    uint32_t least = 0, most = kBins;
    if (share * kWarps * 8 > kLeastTokens) {
        least = sample_bound(a.sample_key + index * (a.key_stride / kSampleTokens), first, last, among, budget, shared);
    }
    if (threadIdx.x == 0) shared.incomplete = share * kWarps * 8 > 1 << kOffsetBits;
    __syncthreads();
    arrive_at_cluster();
    uint32_t collected;
    for (int round = 0; round < 2; round++) {
        collected = collect(part, least, most, true, held, capacity, shared);
        if (collected > capacity || most < kBins) shared.incomplete = 1;
        __syncthreads();
        wait_for_cluster();  // all have begun, and none is still looking
        sum_bins(shared, blocks, block);
        __syncthreads();
        arrive_at_cluster();
        if (most == kBins) list_fixed();
        wait_for_cluster();
        if (threadIdx.x < 32) find_threshold(shared, blocks, block, budget);
        __syncthreads();
        arrive_at_cluster();
        if (shared.found.enclosed) break;
        most = least;  // the sample misled: count all others too
        least = 0;
    }

    // A warp's part of the list is what it has collected; where that was too much to be held, it collects once more, so
    // many vectors at a time as can be held in any case: first to count, then to list.
    const Found found = shared.found;
    const bool complete = !shared.incomplete;
    const int piece_vectors = complete ? share : static_cast<int>(capacity / 8), lane = threadIdx.x & 31;
    Progress progress{0, 0};
    uint32_t own_above = 0, own_tied = 0;
    for (int phase = 0; phase < 2; phase++) {
        for (int begin = part.begin; begin < part.end; begin += piece_vectors) {
            Part piece = part;
            if (!complete) {
                piece.origin = piece.begin = begin;
                piece.end = min(part.end, begin + piece_vectors);
                collected = collect(piece, found.bin, kBins, false, held, capacity, shared);
            }
            if (phase == 0) {
                const uint32_t own = count_collected(held, collected, found.bin);
                own_above += own & 0xffff;
                own_tied += own >> 16;
            } else {
                put_collected(list, piece.origin, held, collected, found.bin, progress);
            }
            __syncwarp();
        }
        if (phase == 1) break;
        if (lane == 0) shared.warp_count[0][warp] = own_above, shared.warp_count[1][warp] = own_tied;
        __syncthreads();
        // What comes before: the fixed tokens, other blocks' and other warps'.
        const uint32_t above = __reduce_add_sync(~0u, lane < warp ? shared.warp_count[0][lane] : 0);
        const uint32_t tied = __reduce_add_sync(~0u, lane < warp ? shared.warp_count[1][lane] : 0);
        const uint32_t ties = budget - found.above, ties_before = min(found.ties_before + tied, ties);
        progress = Progress{fixed_before + found.above_before + above + ties_before, ties - ties_before};
    }
    wait_for_cluster();
    return listed;
}

// What a block, with its cluster, has selected.
struct Selected {
    Item item;
    int64_t index;  // of the head among all items' selecting heads
    int listed;     // slots
};

// A kernel's beginning: select for the head that this block's place in the grid names.  False: its item is not sparse.
__device__ inline bool select_head(const Arguments& a, Shared& shared, Selected& head) {
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) {
        reinterpret_cast<uint4*>(shared.count)[i] = make_uint4(0, 0, 0, 0);
    }
    wait_for_previous_kernel();
    head.item = a.item[blockIdx.z];
    if (head.item.mode != kItemSparse) return false;
    head.index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    head.listed = select_slots(a, head.item, head.index, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) a.listed[head.index] = head.listed;
    return true;
}

// Bytes of shared memory that a block needs.
inline size_t shared_bytes(const Arguments& a) {
    return sizeof(Shared) + a.select_capacity * sizeof(uint32_t);
}

// Launch a kernel that begins with select_head: a cluster for each head of each item.
inline cudaError_t launch(void (*kernel)(Arguments), const Arguments& a, cudaStream_t stream) {
    const size_t bytes = shared_bytes(a);
    const cudaError_t status = set_up(kernel, bytes);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.select_blocks, a.select_heads, a.items), dim3(kThreads), bytes, stream);
    if (a.select_blocks > 1) launch.cluster(a.select_blocks);
    return launch.overlapped(a.overlapped)(kernel, a);
}

}  // namespace select
}  // namespace socket_trt

#endif  // SOCKET_TRT_SELECT_CUH_
