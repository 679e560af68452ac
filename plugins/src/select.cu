// From scores to the list of cache slots that each selecting head of a sparse item attends to: exactly the budget, in
// order of position, of equal scores those at lower positions.
//
// A cluster of blocks shares the tokens of one head.  Each block counts its keys in a histogram with a bin for every key;
// a look at all blocks' histograms, at sums of 128 bins and then at 128 bins, finds the key that the budget ends in, and
// how much of the list comes before a block's own part.  Then every block lists its part.  Counting in shared memory is
// slow, so that only keys above a bound are counted, which a sample of the row gives; should it have misled, the others
// are counted too.  Where there are no clusters (before compute capability 9.0) one block has a head for itself.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 16384;  // a key is the upper 14 of a positive float16's 15 bits
constexpr int kCoarse = 128, kFine = kBins / kCoarse;
constexpr int kOwnBins = kBins / kThreads;
constexpr int kVectors = 4;         // of eight keys, that a thread looks at in one go
constexpr int kSamples = 2048;
constexpr int kMaxBlocks = 8;       // a cluster that any GPU with clusters can run
constexpr int kLeastTokens = 2048;  // of a block

// Where the budget ends, as one warp finds it.
struct Found {
    uint32_t bin;
    uint32_t above;         // keys in higher bins
    uint32_t above_before;  // of them, those of the blocks before this one
    uint32_t ties_before;   // those blocks' keys in the bin itself
};

struct Shared {
    uint32_t coarse[kCoarse];
    uint32_t scan[33];
    uint32_t bound, enclosed, threshold;
    Found found;
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

// Four words of another block's shared memory, at the place where they are in this block's.
__device__ __forceinline__ uint4 load_of_block(const uint4* words, int block) {
#if __CUDA_ARCH__ >= 900
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(words));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(block));
    uint4 x;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address));
    return x;
#else
    return *words;
#endif
}

__device__ __forceinline__ uint32_t inclusive_warp_sum(uint32_t value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t below = __shfl_up_sync(~0u, value, step);
        if ((threadIdx.x & 31) >= step) value += below;
    }
    return value;
}

// One warp's search in 128 counters of all blocks, from the highest on, for that in which the `wanted`-th key lies; false
// where all of them are fewer.
__device__ bool find_bin(const uint32_t* counters, int blocks, int block, uint32_t wanted, Found& found) {
    static_assert(kCoarse == 128 && kFine == 128, "four counters a lane");
    const int lane = threadIdx.x & 31;
    uint32_t all[4] = {}, before[4] = {};  // the highest first
#pragma unroll 8
    for (int other = 0; other < blocks; other++) {
        const uint4 x = load_of_block(reinterpret_cast<const uint4*>(counters) + 31 - lane, other);
        const uint32_t own[4] = {x.w, x.z, x.y, x.x};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            all[i] += own[i];
            before[i] += other < block ? own[i] : 0;
        }
    }
    const uint32_t sum = all[0] + all[1] + all[2] + all[3];
    const uint32_t sum_before = before[0] + before[1] + before[2] + before[3];
    Found mine{0, inclusive_warp_sum(sum) - sum, inclusive_warp_sum(sum_before) - sum_before, 0};
    const uint32_t reached = __ballot_sync(~0u, mine.above + sum >= wanted);
    if (reached == 0) return false;
    bool searching = true;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        searching = searching && mine.above + all[i] < wanted;
        if (searching) {
            mine.above += all[i];
            mine.above_before += before[i];
        }
        if (searching || i == 0) {  // this bin, or the next
            mine.bin = 127 - lane * 4 - i - (searching ? 1 : 0);
        }
    }
    const int at = 3 - (mine.bin & 3);
    mine.ties_before = at == 0 ? before[0] : at == 1 ? before[1] : at == 2 ? before[2] : before[3];
    const int owner = __ffs(reached) - 1;
    found.bin = __shfl_sync(~0u, mine.bin, owner);
    found.above = __shfl_sync(~0u, mine.above, owner);
    found.above_before = __shfl_sync(~0u, mine.above_before, owner);
    found.ties_before = __shfl_sync(~0u, mine.ties_before, owner);
    return true;
}

__device__ __forceinline__ uint32_t bin_of(uint32_t key) {
    return key >> 1 & (kBins - 1);
}

// Bits of eight keys, those in bins [least, most).
__device__ __forceinline__ uint32_t keys_between(const uint4& keys, uint32_t least, uint32_t most) {
    const uint32_t word[4] = {keys.x, keys.y, keys.z, keys.w};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t bin = (i & 1 ? word[i / 2] >> 17 : word[i / 2] >> 1) & (kBins - 1);
        if (bin - least < most - least) bits |= 1u << i;
    }
    return bits;
}

// Sum of a thread's 32 counters, turned against bank conflicts.
__device__ __forceinline__ uint32_t own_counters(const uint32_t* count, int own) {
    const uint4* from = reinterpret_cast<const uint4*>(count + own * kOwnBins);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kOwnBins / 4; i++) {
        const uint4 x = from[(i + threadIdx.x) & (kOwnBins / 4 - 1)];
        sum += x.x + x.y + x.z + x.w;
    }
    return sum;
}

// A bin that very likely holds, with all above it, at least the budget of a row's keys, and not many more.  `count` is
// zero before and after.  All threads must call it.
__device__ uint32_t sample_bound(const uint16_t* keys, int first, uint32_t among, uint32_t budget, uint32_t* count,
                                 Shared& shared) {
    constexpr int kOwn = kSamples / kThreads;
    uint32_t bin[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const uint32_t sample = threadIdx.x * kOwn + i;
        bin[i] = bin_of(__ldg(keys + first + static_cast<uint32_t>(static_cast<uint64_t>(sample) * among / kSamples)));
    }
#pragma unroll
    for (int i = 0; i < kOwn; i++) atomicAdd(&count[bin[i]], 1u);
    // Five standard deviations more than the budget's share of the sample.
    const float share = static_cast<float>(budget) / among * kSamples;
    const uint32_t wanted = static_cast<uint32_t>(share + 5.f * sqrtf(share)) + 8;
    if (threadIdx.x == 0) shared.bound = 0;
    __syncthreads();
    const int own = kThreads - 1 - static_cast<int>(threadIdx.x);
    const uint32_t sum = own_counters(count, own);
    uint32_t total, above = exclusive_scan(sum, shared.scan, total);
    if (above < wanted && above + sum >= wanted) {
        int last = (own + 1) * kOwnBins;
        while (above < wanted) above += count[--last];
        shared.bound = last;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; i++) count[bin[i]] = 0;
    const uint32_t bound = shared.bound;
    __syncthreads();
    return bound;
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
        for (int p = first + block * kThreads + threadIdx.x; p < last; p += blocks * kThreads) put(place + p - first, p);
    }
};

__global__ __launch_bounds__(kThreads, 2) void select_kernel(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) uint32_t count[];  // [kBins]
    __shared__ __align__(16) Shared shared;
    const int blocks = gridDim.x, block = blockIdx.x;
    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const Candidates candidates(a, item.length);
    const int first = min(candidates.first, item.length), last = max(candidates.last, first);
    const uint32_t budget = attended_budget(a, item.length), among = last - first;
    const int64_t index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    const List list{a, item.row, a.slot + index * a.list_stride};
    if (among <= budget) {
        list.put_all(0, candidates.visible, item.length, blocks, block);
        if (block == 0 && threadIdx.x == 0) a.listed[index] = min(item.length - candidates.visible, a.list_stride);
        return;
    }
    const uint32_t fixed_before = first - candidates.visible, fixed = fixed_before + item.length - last;
    if (block == 0 && threadIdx.x == 0) a.listed[index] = min(fixed + budget, static_cast<uint32_t>(a.list_stride));
    if (budget == 0) {
        list.put_all(0, candidates.visible, first, blocks, block);
        list.put_all(fixed_before, last, item.length, blocks, block);
        return;
    }

    // This block's keys: vectors [begin, end) of eight.
    const uint16_t* row = a.score_key + index * a.key_stride;
    const uint4* vectors = reinterpret_cast<const uint4*>(row);
    const int first_vector = first / 8, last_vector = (last + 7) / 8;
    const int share = (last_vector - first_vector + blocks - 1) / blocks;
    const int begin = min(last_vector, first_vector + block * share), end = min(last_vector, begin + share);
    // Bits of a vector whose keys are candidates: all, but in the first and the last one.
    const auto candidate_bits = [&](int vector) {
        uint32_t bits = 0xff;
        if (vector * 8 < first) bits &= 0xff << (first - vector * 8);
        if (vector * 8 + 8 > last) bits &= 0xff >> (vector * 8 + 8 - last);
        return bits;
    };
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) {
        reinterpret_cast<uint4*>(count)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    uint32_t least = 0, most = kBins;
    if (share * 8 > kSamples) least = sample_bound(row, first, among, budget, count, shared);

    while (true) {
        for (int base = begin; base < end; base += kVectors * kThreads) {
            uint4 keys[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                const int at = base + v * kThreads + threadIdx.x;
                keys[v] = at < end ? __ldg(vectors + at) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                const int at = base + v * kThreads + threadIdx.x;
                if (at >= end) continue;
                uint32_t bits = keys_between(keys[v], least, most) & candidate_bits(at);
                for (; bits; bits &= bits - 1) {
                    const int i = __ffs(bits) - 1;
                    const uint32_t low = i & 2 ? keys[v].y : keys[v].x, high = i & 2 ? keys[v].w : keys[v].z;
                    const uint32_t word = i & 4 ? high : low;
                    atomicAdd(&count[bin_of(i & 1 ? word >> 16 : word)], 1u);
                }
            }
        }
        __syncthreads();
        {
            static_assert(kThreads == 4 * kCoarse, "four threads a sum");
            uint32_t sum = own_counters(count, threadIdx.x);
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if ((threadIdx.x & 3) == 0) shared.coarse[threadIdx.x >> 2] = sum;
        }
        __syncthreads();
        arrive_at_cluster();
        wait_for_cluster();
        if (threadIdx.x < 32) {
            Found coarse, fine;
            const bool enclosed = find_bin(shared.coarse, blocks, block, budget, coarse);
            if (enclosed) {
                find_bin(count + coarse.bin * kFine, blocks, block, budget - coarse.above, fine);
                if (threadIdx.x == 0) {
                    shared.found = Found{coarse.bin * kFine + fine.bin, coarse.above + fine.above,
                                         coarse.above_before + fine.above_before, fine.ties_before};
                }
            }
            if (threadIdx.x == 0) shared.enclosed = enclosed;
        }
        __syncthreads();
        arrive_at_cluster();
        if (shared.enclosed) break;
        wait_for_cluster();
        most = least;  // the sample misled: count all others too
        least = 0;
    }

    const Found found = shared.found;
    const uint32_t ties = budget - found.above, ties_before = min(found.ties_before, ties), own_ties = ties - ties_before;
    const uint32_t start = fixed_before + found.above_before + ties_before;
    list.put_all(0, candidates.visible, first, blocks, block);
    list.put_all(fixed_before + budget, last, item.length, blocks, block);
    uint32_t listed_above = 0, seen_ties = 0;
    for (int base = begin; base < end; base += kVectors * kThreads) {
        const int own = base + threadIdx.x * kVectors;
        uint4 keys[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; v++) keys[v] = own + v < end ? __ldg(vectors + own + v) : make_uint4(0, 0, 0, 0);
        uint32_t above = 0, tied = 0;  // a bit for each key
#pragma unroll
        for (int v = 0; v < kVectors; v++) {
            if (own + v >= end) continue;
            const uint32_t wanted = candidate_bits(own + v);
            above |= (keys_between(keys[v], found.bin + 1, kBins) & wanted) << (v * 8);
            tied |= (keys_between(keys[v], found.bin, found.bin + 1) & wanted) << (v * 8);
        }
        uint32_t total;
        const uint32_t before = exclusive_scan(__popc(above) | __popc(tied) << 16, shared.scan, total);
        uint32_t rank = seen_ties + (before >> 16);
        uint32_t place = start + listed_above + (before & 0xffff) + min(rank, own_ties);
        for (uint32_t bits = above | tied; bits; bits &= bits - 1) {
            const int bit = __ffs(bits) - 1;
            if (tied >> bit & 1 && rank++ >= own_ties) continue;
            list.put(place++, own * 8 + bit);
        }
        listed_above += total & 0xffff;
        seen_ties += total >> 16;
    }
    wait_for_cluster();
}

}  // namespace

int plan_select(const Arguments& a, const Device& device) {
    int blocks = 1;
    if (device.architecture < 90) return blocks;
    const int64_t heads = static_cast<int64_t>(a.items) * a.select_heads;
    while (blocks < kMaxBlocks && heads * blocks * 2 <= 2 * device.multiprocessors &&
           a.max_length / (blocks * 2) >= kLeastTokens) {
        blocks *= 2;
    }
    return blocks;
}

cudaError_t launch_select(const Arguments& a, cudaStream_t stream) {
    constexpr int kSharedBytes = kBins * sizeof(uint32_t);
    const cudaError_t status =
        cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.select_blocks, a.select_heads, a.items), dim3(kThreads), kSharedBytes, stream);
    if (a.select_blocks > 1) launch.cluster(a.select_blocks);
    return launch(select_kernel, a);
}

}  // namespace socket_trt
