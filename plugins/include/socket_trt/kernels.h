/* C interface of libsocket_trt_kernels: the SocketAttention operator on CUDA, knowing neither TensorRT nor PyTorch.
 *
 * One call appends a step's tokens to the paged cache and attends: sparse decode, dense decode, prefill and any mix of
 * them in one packed batch.  The call only enqueues kernels on the given stream: it allocates nothing, waits for
 * nothing and reads no device memory, so it can be captured in a CUDA graph (call SocketTrtPrepare once before).
 *
 * docs/kernels.md describes the kernels; socket_trt/reference is the specification.
 */
#ifndef SOCKET_TRT_KERNELS_H_
#define SOCKET_TRT_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SOCKET_TRT_API __attribute__((visibility("default")))
#else
#define SOCKET_TRT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever the structure below or a function changes its meaning. */
#define SOCKET_TRT_ABI_VERSION 2

typedef enum SocketTrtStatus {
    SOCKET_TRT_SUCCESS = 0,
    SOCKET_TRT_INVALID_ARGUMENT = 1, /* a shape, pointer or attribute; SocketTrtLastError says which */
    SOCKET_TRT_UNSUPPORTED = 2,      /* valid, but no kernel of this library computes it */
    SOCKET_TRT_WORKSPACE_TOO_SMALL = 3,
    SOCKET_TRT_CUDA_ERROR = 4
} SocketTrtStatus;

typedef enum SocketTrtDtype { SOCKET_TRT_FLOAT16 = 0, SOCKET_TRT_BFLOAT16 = 1 } SocketTrtDtype;

typedef enum SocketTrtSelection { SOCKET_TRT_QUERY_HEAD = 0, SOCKET_TRT_KV_HEAD = 1 } SocketTrtSelection;

/* Stages of one call, for benchmarks that time a part of it: bits of SocketTrtAttentionParams::stages. */
typedef enum SocketTrtStage {
    SOCKET_TRT_STAGE_APPEND = 1, /* keys, values, codes, norms into the cache; queries projected on the planes */
    SOCKET_TRT_STAGE_SCORE = 2,  /* a 16-bit score of every cached token */
    SOCKET_TRT_STAGE_SELECT = 4, /* the list of attended tokens */
    SOCKET_TRT_STAGE_ATTEND = 8, /* partial attention of decode queries, sparse and dense */
    SOCKET_TRT_STAGE_COMBINE = 16,
    SOCKET_TRT_STAGE_PREFILL = 32
} SocketTrtStage;

/* Shapes as in socket_trt.reference.socket_attention: N tokens, B sequences, Hq/Hkv heads, head size D, P pages, M
 * pages a sequence at most, L tables, R planes, W = page_size * bits / 32 words, bits = 8 up to 8 planes, else 16.
 * Pointers are device pointers, contiguous and aligned to 16 bytes. */
typedef struct SocketTrtAttentionParams {
    uint32_t struct_size; /* sizeof(SocketTrtAttentionParams) of the caller */
    int32_t dtype;        /* SocketTrtDtype of every floating-point tensor */

    int32_t tokens;             /* N */
    int32_t sequences;          /* B */
    int32_t query_heads;        /* Hq, a multiple of Hkv, at most 16 Hkv */
    int32_t kv_heads;           /* Hkv */
    int32_t head_size;          /* D: 64, 96, 128 or 256 */
    int32_t pages;              /* P */
    int32_t page_size;          /* a power of two, 16 to 256 */
    int32_t pages_per_sequence; /* M */
    int32_t tables;             /* L: 1 to 128 */
    int32_t planes_per_table;   /* R: 1 to 16 */

    float scale;
    float temperature;
    int32_t sink;
    int32_t window;
    int32_t budget_tokens;
    int32_t budget_permille;
    int32_t min_length;
    int32_t selection;      /* SocketTrtSelection */
    int32_t sliding_window; /* -1: none */
    float softcap;          /* 0: none */

    const void* query;          /* [1, Hq, N, D] */
    const void* key;            /* [1, Hkv, N, D] */
    const void* value;          /* [1, Hkv, N, D] */
    void* key_cache;            /* [P, Hkv, page_size, D], updated in place like the other caches */
    void* value_cache;          /* [P, Hkv, page_size, D] */
    void* code_cache;           /* int32 [P, Hkv, L, W] */
    void* norm_cache;           /* [P, Hkv, page_size] */
    const int32_t* page_table;  /* [B, M] */
    const int32_t* past_length; /* [B] */
    const int32_t* query_start; /* [B + 1] */
    const void* planes;         /* [L, R, D] */
    void* output;               /* [1, Hq, N, D] */

    void* workspace; /* at least SocketTrtAttentionWorkspace bytes; nothing in it outlives the call */
    uint64_t workspace_bytes;
    uint32_t stages; /* 0: all; otherwise SocketTrtStage bits, over a workspace that a whole call has filled */
} SocketTrtAttentionParams;

/* SOCKET_TRT_ABI_VERSION of the library. */
SOCKET_TRT_API int32_t SocketTrtAbiVersion(void);

/* The library's release and its embedded kernels, one line each: "name arch dtype head_size". */
SOCKET_TRT_API const char* SocketTrtKernels(void);

/* Text of a status, and what was wrong in this thread's last call that did not succeed. */
SOCKET_TRT_API const char* SocketTrtStatusText(int32_t status);
SOCKET_TRT_API const char* SocketTrtLastError(void);

/* Load the kernels for the current device.  Optional, but not allowed to happen first inside a graph capture. */
SOCKET_TRT_API int32_t SocketTrtPrepare(void);

/* Bytes of workspace that a call with these shapes and attributes needs; looks at no pointer. */
SOCKET_TRT_API int32_t SocketTrtAttentionWorkspace(const SocketTrtAttentionParams* params, uint64_t* bytes);

/* Where a call leaves the lists of attended cache slots in its workspace: for tests and for measuring selections. */
typedef struct SocketTrtSelectionView {
    uint64_t slots_offset;  /* int32 [items, heads, list_stride]: page * page_size + place in the page, by position */
    uint64_t counts_offset; /* uint32 [items, heads]: the number of slots */
    int32_t items;          /* N where N <= B, and an item is a token; else B, and an item is a sequence */
    int32_t heads;          /* Hq, or Hkv with SOCKET_TRT_KV_HEAD; 0: no sequence can be attended sparsely */
    int32_t list_stride;
} SocketTrtSelectionView;
SOCKET_TRT_API int32_t SocketTrtAttentionSelection(const SocketTrtAttentionParams* params,
                                                   SocketTrtSelectionView* view);

/* Enqueue the operator on `stream` (a cudaStream_t) of the current device. */
SOCKET_TRT_API int32_t SocketTrtAttention(const SocketTrtAttentionParams* params, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SOCKET_TRT_KERNELS_H_ */
