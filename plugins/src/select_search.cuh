// Selection's shared memory, and the search of histograms for the key that a budget ends in.
#ifndef SOCKET_TRT_SELECT_SEARCH_CUH_
#define SOCKET_TRT_SELECT_SEARCH_CUH_

#include "cluster.cuh"
#include "launchers.h"

namespace socket_trt {
namespace select {

constexpr int kThreads = 512;
constexpr int kBins = 16384;  // a key is the upper 14 of a positive float16's 15 bits
constexpr int kCoarse = 128, kFine = kBins / kCoarse;
constexpr int kWarps = kThreads / 32;
constexpr int kOffsetBits = 18;  // of a collected key's place
constexpr uint32_t kOffsets = (1u << kOffsetBits) - 1;
static_assert(uint64_t{kBins} << kOffsetBits == uint64_t{1} << 32, "a word holds a bin and a place");
constexpr int kLeastTokens = 4096;  // of a block
constexpr int kMostSamples = 2048, kLeastSamples = 60;
constexpr int kMostUnbounded = 4096;  // tokens, all of which a block collects
static_assert((kLeastSamples + 2) * kSampleTokens <= kMostUnbounded, "without enough samples there is no bound");
constexpr int kMostRounds = 8;  // more than bounds need to go through all keys

// Keys on their way to a warp, in stages.  A lane looks at three vectors of eight that are neighbours: an odd number,
// so that lanes that load theirs at once meet in no bank.
constexpr int kLaneVectors = 3, kLaneKeys = 8 * kLaneVectors;
constexpr int kStageVectors = 32 * kLaneVectors, kStageBytes = kStageVectors * 16;
constexpr int kStages = 2;
constexpr int kRingWords = kWarps * kStages * kStageBytes / 4;
// With a bound the histogram is shorter, to leave room for the stages: eight powers of two from the bound on, and its
// last bin takes all that is beyond.
constexpr int kBoundedBins = kBins - kRingWords;
constexpr int kSampleBins = kBins / 2;  // finer ones are not worth their room
// Without a bound a warp has so few keys that the first vector that each lane copies is all, and then whole lanes'
// worth.
constexpr int kUnboundedRingWords = (32 + kLaneVectors - 1) / kLaneVectors * kLaneVectors * 4;
static_assert(kMostUnbounded / kWarps <= 32 * 8, "a vector of eight a lane");

// Where the budget ends.
struct Found {
    uint32_t bin;           // in the histogram
    uint32_t above;         // keys in higher bins
    uint32_t above_before;  // of them, those of the blocks before this one
    uint32_t ties_before;   // those blocks' keys in the bin itself
    uint32_t enclosed;      // 0: all keys that were counted are fewer than the budget
};

// What the blocks of a cluster send each other: sums of kFine bins each, a sum's bins, slots of the list, and what they
// have attended to.
enum Purpose : int { kSums, kBinsOfSum, kSlots, kResults, kPurposes };

struct Shared {
    uint64_t arrived[kPurposes];  // of each; nothing may ever lie over them
    alignas(16) uint32_t coarse[kMaxCluster][kCoarse];
    uint32_t fine[kMaxCluster][kFine];
    uint32_t warp_count[2][kWarps];
    uint32_t incomplete;
    Found found;
    alignas(16) uint32_t pool[kBins];  // a histogram, or with a bound the warps' stages and then a shorter one
    uint32_t collected[1];  // of each warp: bin << kOffsetBits | place in the block's part of the row; and behind it,
                            // where the cluster attends, its slots of the list and its results
};
constexpr int kZeroed = kRingWords + kSampleBins;  // words of pool and collected that a block begins with
static_assert(kZeroed >= kBins, "histograms begin with zeros");

// How a warp uses the block's shared memory.
struct Room {
    uint32_t* count;    // the block's histogram
    int bins;           // in it
    uint32_t ring;      // address of the warp's first stage
    uint32_t* held;     // what it has collected
    uint32_t capacity;  // keys that it can hold

    __device__ Room(Shared& shared, bool bounded, int capacity_of_block) {
        const int warp = threadIdx.x >> 5;
        const uint32_t* stages;
        if (bounded) {
            count = shared.pool + kRingWords;
            bins = kBoundedBins;
            stages = shared.pool + warp * (kRingWords / kWarps);
            capacity = capacity_of_block / kWarps;
            held = shared.collected + warp * capacity;
        } else {  // a warp's part is a fraction of a stage
            count = shared.pool;
            bins = kBins;
            stages = shared.collected + warp * kUnboundedRingWords;
            capacity = kMostUnbounded / kWarps;
            held = shared.collected + kWarps * kUnboundedRingWords + warp * capacity;
        }
        ring = shared_address(stages);
    }
};
constexpr int kLeastCapacity = kWarps * kUnboundedRingWords + kMostUnbounded;
static_assert(kZeroed - kBins <= kLeastCapacity, "the sample's histogram takes part of the room for what is collected");

__device__ __forceinline__ uint32_t bin_of(uint32_t key) {
    return key >> 1 & (kBins - 1);
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

// What a search in sums and one in the bins of the sum that it found come to.
__device__ __forceinline__ Found together(const Found& sum, const Found& bin) {
    if (!sum.enclosed) return sum;
    return Found{sum.bin * kFine + bin.bin, sum.above + bin.above, sum.above_before + bin.above_before, bin.ties_before,
                 1};
}

// Both in this block's histogram, its sums being in shared.coarse[0], by one warp.
__device__ inline Found find_own(const Shared& shared, const uint32_t* count, uint32_t wanted) {
    const auto search = [](const uint32_t* counters, uint32_t wanted) {
        return find_bin(1, 0, wanted,
                        [&](int, int vector) { return reinterpret_cast<const uint4*>(counters)[vector]; });
    };
    const Found sum = search(shared.coarse[0], wanted);
    return sum.enclosed ? together(sum, search(count + sum.bin * kFine, wanted - sum.above)) : sum;
}

// Both in all blocks' histograms, by each block's first warp.  `turn` counts the searches before.
__device__ inline Found find_threshold(Shared& shared, const uint32_t* count, int blocks, int block, uint32_t wanted,
                                       uint32_t turn) {
    if (blocks == 1) return find_own(shared, count, wanted);
    Channel(shared.arrived[kSums], blocks).wait(turn);
    const Found sum = find_bin(blocks, block, wanted, [&](int other, int vector) {
        return reinterpret_cast<const uint4*>(shared.coarse[other])[vector];
    });
    // Every block has found the same sum, and sends its bins; or any, if none was reached: who has received all blocks'
    // bins knows that none needs their sums any more.
    const Channel bins(shared.arrived[kBinsOfSum], blocks);
    const uint4 own = reinterpret_cast<const uint4*>(count + (sum.enclosed ? sum.bin * kFine : 0))[threadIdx.x];
    for (int other = 0; other < blocks; other++) {
        bins.send(reinterpret_cast<uint4*>(shared.fine[block]) + threadIdx.x, other, own);
    }
    bins.wait(turn);
    return together(sum, find_bin(blocks, block, wanted - sum.above, [&](int other, int vector) {
                        return reinterpret_cast<const uint4*>(shared.fine[other])[vector];
                    }));
}

// Sums of 128 bins each, of a histogram of `bins`, to all blocks.
__device__ inline void sum_bins(Shared& shared, const uint32_t* count, int bins, int blocks, int block) {
    static_assert(kThreads == 4 * kCoarse && kFine == 4 * 32, "four threads a sum, 32 bins a thread");
    const uint4* from = reinterpret_cast<const uint4*>(count) + threadIdx.x * 8;
    uint32_t sum = 0;
    if (threadIdx.x < bins / 32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint4 x = from[(i + threadIdx.x) & 7];  // turned, against bank conflicts
            sum += x.x + x.y + x.z + x.w;
        }
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const Channel channel(shared.arrived[kSums], blocks);
    for (int other = threadIdx.x & 3; other < blocks; other += 4) {
        channel.send(&shared.coarse[block][threadIdx.x >> 2], other, sum);
    }
}

}  // namespace select
}  // namespace socket_trt

#endif  // SOCKET_TRT_SELECT_SEARCH_CUH_
