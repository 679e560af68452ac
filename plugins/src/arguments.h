// What every kernel of the SocketAttention operator is told: one structure, passed by value.
//
// Names follow socket_trt/reference.  An *item* is one decode query (all its heads): where a step has at most as many
// tokens as sequences every token is an item, otherwise every sequence is (and the prefill kernel takes those with
// several tokens).  Which items exist, and how long their sequences are, is known on the device alone: grids are sized
// for the worst case that the shapes allow, and blocks without work leave at once.
#ifndef SOCKET_TRT_ARGUMENTS_H_
#define SOCKET_TRT_ARGUMENTS_H_

#include <cstdint>

#include "socket_trt/kernels.h"

namespace socket_trt {

enum ItemMode : int32_t { kItemNone = 0, kItemDense = 1, kItemSparse = 2 };

// A decode query, as the append kernel finds it for all kernels behind it.
struct Item {
    int32_t row;     // sequence
    int32_t token;   // its place in the packed step
    int32_t length;  // tokens it may see, itself included
    int32_t mode;
};

// A tile of a prefill chunk: up to kPrefillRows consecutive tokens of one sequence.
struct PrefillTile {
    int32_t row;
    int32_t token;     // first token, in the packed step
    int32_t tokens;    // 0: no work
    int32_t position;  // of the first token in its sequence
};

constexpr int kPrefillRows = 128;  // BLOCK_M of plugins/triton/prefill_attention.py
constexpr int kMaxSplits = 64;     // MAX_SPLITS of plugins/triton/decode_attention.py
constexpr int kSampleTokens = 64;  // of so many tokens the key of one is kept aside
constexpr int kScoreUnit = 256;    // rows of score keys begin and end on whole units of so many tokens

struct Arguments {
    SocketTrtAttentionParams p;

    // Derived on the host.
    int32_t group;  // query heads a KV head
    int32_t page_shift;
    int32_t code_bytes;  // 1 or 2
    int32_t max_length;  // M * page_size
    int32_t items;
    int32_t items_are_tokens;
    int32_t sparse;        // 0: every sequence that fits the page table is attended densely
    int32_t select_heads;  // heads that select: Hq or Hkv
    int32_t key_stride;    // score keys of one item and head
    int32_t list_stride;   // listed slots of one item and head
    int32_t prefill_tiles;
    int32_t sparse_splits;  // parts that one item's attention is split into
    int32_t dense_splits;
    int32_t combined;         // the sparse attention kernel combines its parts itself
    int32_t select_blocks;    // blocks that select for one head together: a cluster
    int32_t select_capacity;  // keys that such a block can hold
    int32_t select_attached;  // words of shared memory behind them: where such a block attends, its slots and results
    int32_t select_spread;    // such a block has a multiprocessor for itself
    int32_t select_attends;   // they attend to what they have selected
    int32_t overlapped;       // the device can begin a kernel while the one before it still runs

    // Workspace.
    Item* item;                 // [items]
    PrefillTile* prefill_tile;  // [prefill_tiles]
    float* probability;         // [items, Hq, R, L]: of a plane's positive side
    uint16_t* score_key;        // [items, select_heads, key_stride]: float16, to compare
    uint16_t* sample_key;       // [items, select_heads, key_stride / kSampleTokens]: one of each so many
    void* score_partial;        // sums so far, where a score takes several passes
    uint32_t* listed;           // [items, select_heads]: slots in the list
    int32_t* slot;              // [items, select_heads, list_stride]: page * page_size + place in the page
    int32_t* arrived;           // [items, select_heads]: parts that are done, if they combine themselves
    float* partial_output;      // [items, Hq, splits, D]
    float* partial_stats;       // [items, Hq, splits, 2]: maximum (base 2) and sum
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_ARGUMENTS_H_
