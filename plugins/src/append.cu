// First kernel of the operator: everything that later kernels read.
//
// Key blocks write a tile of tokens into the cache: keys and values as they are, the values' norms, and the keys' hash
// codes.  Item blocks describe each decode query (Item), project its query heads on the planes, and zero the
// selection's histogram and counters.  One tile block lists the prefill tiles.
//
// Projections are float32 sums over shared-memory vectors: four threads share one plane (64 bytes of a row a load), and
// each plane row is used for four vectors at a time.
#include "device.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

constexpr int kThreads = 256;
constexpr int kPlanesAtOnce = kThreads / 4;
constexpr int kMaxVectors = 16;
constexpr int kMaxHeadSize = 256;

struct AppendGrid {
    int tables_per_block, chunks;  // a block hashes this many tables
    int tile_tokens, tiles;        // key blocks: tiles * Hkv * chunks
    int item_chunks;               // item blocks: items * Hkv * item_chunks
    int key_blocks, item_blocks, tile_blocks;

    __host__ __device__ explicit AppendGrid(const Arguments& a) {
        tables_per_block = kPlanesAtOnce / a.p.planes_per_table;
        chunks = (a.p.tables + tables_per_block - 1) / tables_per_block;
        tile_tokens = a.p.tokens > a.p.sequences ? kMaxVectors : 1;
        tiles = (a.p.tokens + tile_tokens - 1) / tile_tokens;
        item_chunks = a.sparse ? chunks : 1;
        key_blocks = tiles * a.p.kv_heads * chunks;
        item_blocks = a.items * a.p.kv_heads * item_chunks;
        tile_blocks = a.prefill_tiles > 0 ? 1 : 0;
    }
};

struct Shared {
    float vectors[kMaxVectors][kMaxHeadSize];
    uint8_t bits[kMaxVectors][kPlanesAtOnce];
    int row[kMaxVectors];
    int64_t slot[kMaxVectors];  // page * page_size + place in the page; -1: not cached
    uint32_t scan[33];
};

// Eight values of a plane.
template <typename T>
struct Piece {
    uint4 raw;
    __device__ __forceinline__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(&raw)[i]); }
};

// use(vector, plane, projection) for each of `count` vectors in shared memory and each plane of `planes` rows.
template <typename T, typename Use>
__device__ void project(const Arguments& a, const Shared& shared, const T* planes, int rows, int count, Use use) {
    const int quarter = threadIdx.x & 3, plane = threadIdx.x >> 2;
    const int pieces = a.p.head_size / 8;
    const uint4* row =
        reinterpret_cast<const uint4*>(planes + static_cast<int64_t>(min(plane, rows - 1)) * a.p.head_size);
    for (int first = 0; first < count; first += 4) {
        float sum[4] = {};
#pragma unroll 4
        for (int i = quarter; i < pieces; i += 4) {
            const Piece<T> w{__ldg(row + i)};
#pragma unroll
            for (int v = 0; v < 4; v++) {
                const float4* x = reinterpret_cast<const float4*>(&shared.vectors[first + v][i * 8]);
                const float4 low = x[0], high = x[1];
                sum[v] += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w;
                sum[v] += w[4] * high.x + w[5] * high.y + w[6] * high.z + w[7] * high.w;
            }
        }
#pragma unroll
        for (int v = 0; v < 4; v++) {
            sum[v] += __shfl_xor_sync(~0u, sum[v], 1);
            sum[v] += __shfl_xor_sync(~0u, sum[v], 2);
        }
        // Each of the four threads hands over one vector's projection.
        const float mine = quarter == 0 ? sum[0] : quarter == 1 ? sum[1] : quarter == 2 ? sum[2] : sum[3];
        if (plane < rows && first + quarter < count) use(first + quarter, plane, mine);
    }
}

// Vector `v` of `count` from `source(v)`; those up to the next multiple of four become zero.
template <typename T, typename Source>
__device__ void load_vectors(const Arguments& a, Shared& shared, int count, Source source) {
    const int size = a.p.head_size;
    for (int i = threadIdx.x; i < (count + 3) / 4 * 4 * size; i += kThreads) {
        const int v = i / size, d = i % size;
        const T* from = v < count ? source(v) : nullptr;
        shared.vectors[v][d] = from ? to_float(from[d]) : 0.f;
    }
}

template <typename T>
__device__ void append_keys(const Arguments& a, const AppendGrid& grid, Shared& shared, int block) {
    const int chunk = block % grid.chunks, head = block / grid.chunks % a.p.kv_heads;
    const int first = block / grid.chunks / a.p.kv_heads * grid.tile_tokens;
    const int count = min(grid.tile_tokens, a.p.tokens - first);
    const int size = a.p.head_size;
    if (threadIdx.x < kMaxVectors) shared.row[threadIdx.x] = -1;
    __syncthreads();
    for (int row = threadIdx.x; row < a.p.sequences; row += kThreads) {
        const Row r = read_row(a, row);
        for (int v = max(0, r.first - first); v < min(count, r.first + r.count - first); v++) shared.row[v] = row;
    }
    __syncthreads();
    if (threadIdx.x < count) {
        const int row = shared.row[threadIdx.x];
        int64_t slot = -1;
        if (row >= 0) {
            const Row r = read_row(a, row);
            const int64_t position = static_cast<int64_t>(r.past) + first + threadIdx.x - r.first;
            if (position < a.max_length) {
                const int page =
                    a.p.page_table[static_cast<int64_t>(row) * a.p.pages_per_sequence + (position >> a.page_shift)];
                if (static_cast<uint32_t>(page) < static_cast<uint32_t>(a.p.pages)) {
                    slot = (static_cast<int64_t>(page) << a.page_shift) + (position & (a.p.page_size - 1));
                }
            }
        }
        shared.slot[threadIdx.x] = slot;
    }
    __syncthreads();

    const T* key = static_cast<const T*>(a.p.key) + (static_cast<int64_t>(head) * a.p.tokens + first) * size;
    const T* value = static_cast<const T*>(a.p.value) + (static_cast<int64_t>(head) * a.p.tokens + first) * size;
    const int page_mask = a.p.page_size - 1;
    if (chunk == 0) {
        const int pieces = size / 8;
        for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
            const int v = i / pieces, piece = i % pieces;
            const int64_t slot = shared.slot[v];
            if (slot >= 0) {
                const int64_t page_head = (slot >> a.page_shift) * a.p.kv_heads + head;
                const int64_t to = (page_head * a.p.page_size + (slot & page_mask)) * pieces + piece;
                static_cast<uint4*>(a.p.key_cache)[to] = reinterpret_cast<const uint4*>(key)[i];
                static_cast<uint4*>(a.p.value_cache)[to] = reinterpret_cast<const uint4*>(value)[i];
            }
            if (shared.row[v] < 0) {  // padding: its output is zero
                for (int g = 0; g < a.group; g++) {
                    const int64_t to = (static_cast<int64_t>(head * a.group + g) * a.p.tokens + first + v) * pieces;
                    static_cast<uint4*>(a.p.output)[to + piece] = make_uint4(0, 0, 0, 0);
                }
            }
        }
        for (int v = threadIdx.x >> 5; v < count; v += kThreads / 32) {
            float sum = 0.f;
            for (int d = threadIdx.x & 31; d < size; d += 32) {
                const float x = to_float(value[v * size + d]);
                sum += x * x;
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            const int64_t slot = shared.slot[v];
            if ((threadIdx.x & 31) == 0 && slot >= 0) {
                const int64_t page_head = (slot >> a.page_shift) * a.p.kv_heads + head;
                static_cast<T*>(a.p.norm_cache)[page_head * a.p.page_size + (slot & page_mask)] =
                    from_float<T>(sqrtf(sum));
            }
        }
    }

    load_vectors<T>(a, shared, count, [&](int v) { return shared.slot[v] >= 0 ? key + v * size : nullptr; });
    __syncthreads();
    const int rank = a.p.planes_per_table, table = chunk * grid.tables_per_block;
    const int tables = min(grid.tables_per_block, a.p.tables - table);
    const T* planes = static_cast<const T*>(a.p.planes) + static_cast<int64_t>(table) * rank * size;
    project(a, shared, planes, tables * rank, count,
            [&](int v, int plane, float x) { shared.bits[v][plane] = x >= 0.f; });
    __syncthreads();
    for (int i = threadIdx.x; i < count * tables; i += kThreads) {
        const int v = i / tables, t = i % tables;
        const int64_t slot = shared.slot[v];
        if (slot < 0) continue;
        uint32_t code = 0;
        for (int r = 0; r < rank; r++) code = code * 2 + shared.bits[v][t * rank + r];
        const int64_t page_head = (slot >> a.page_shift) * a.p.kv_heads + head;
        const int64_t to = ((page_head * a.p.tables + table + t) << a.page_shift) + (slot & page_mask);
        if (a.code_bytes == 1) {
            static_cast<uint8_t*>(a.p.code_cache)[to] = static_cast<uint8_t>(code);
        } else {
            static_cast<uint16_t*>(a.p.code_cache)[to] = static_cast<uint16_t>(code);
        }
    }
}

// Describe item `index`; all threads of the block must call it.
__device__ Item find_item(const Arguments& a, Shared& shared, int index) {
    if (threadIdx.x == 0) shared.row[0] = a.items_are_tokens ? -1 : index;
    __syncthreads();
    if (a.items_are_tokens) {
        for (int row = threadIdx.x; row < a.p.sequences; row += kThreads) {
            const Row r = read_row(a, row);
            if (r.first <= index && index < r.first + r.count) shared.row[0] = row;
        }
        __syncthreads();
    }
    Item item{shared.row[0], index, 0, kItemNone};
    if (item.row < 0) return item;
    const Row r = read_row(a, item.row);
    if (r.count == 0 || (r.count > 1 && !a.items_are_tokens)) return item;
    if (!a.items_are_tokens) item.token = r.first;
    item.length = min(r.past + (item.token - r.first) + 1, a.max_length);
    item.mode = r.count == 1 && a.sparse && item.length > a.p.min_length ? kItemSparse : kItemDense;
    return item;
}

template <typename T>
__device__ void prepare_item(const Arguments& a, const AppendGrid& grid, Shared& shared, int block) {
    const int chunk = block % grid.item_chunks, head = block / grid.item_chunks % a.p.kv_heads;
    const int index = block / grid.item_chunks / a.p.kv_heads;
    const Item item = find_item(a, shared, index);
    if (chunk == 0 && head == 0 && threadIdx.x == 0) a.item[index] = item;
    if (item.mode != kItemSparse) return;

    const int selecting = a.select_heads / a.p.kv_heads;
    const int64_t first_selection = static_cast<int64_t>(index) * a.select_heads + head * selecting;
    uint4* bins = reinterpret_cast<uint4*>(a.histogram + first_selection * kHistogramBins);
    for (int i = chunk * kThreads + threadIdx.x; i < selecting * kHistogramBins / 4; i += grid.item_chunks * kThreads) {
        bins[i] = make_uint4(0, 0, 0, 0);
    }
    if (chunk == 0 && threadIdx.x < selecting) a.selection[first_selection + threadIdx.x] = SelectionState{};

    const int size = a.p.head_size, rank = a.p.planes_per_table, table = chunk * grid.tables_per_block;
    const int tables = min(grid.tables_per_block, a.p.tables - table);
    const T* query = static_cast<const T*>(a.p.query);
    load_vectors<T>(a, shared, a.group, [&](int v) {
        return query + (static_cast<int64_t>(head * a.group + v) * a.p.tokens + item.token) * size;
    });
    __syncthreads();
    const float factor = 2.f / (sqrtf(static_cast<float>(size)) * a.p.temperature);
    const T* planes = static_cast<const T*>(a.p.planes) + static_cast<int64_t>(table) * rank * size;
    float* logit = a.logit + (static_cast<int64_t>(index) * a.p.query_heads + head * a.group) * a.p.tables * rank;
    project(a, shared, planes, tables * rank, a.group, [&](int v, int plane, float x) {
        logit[static_cast<int64_t>(v) * a.p.tables * rank + table * rank + plane] = factor * tanhf(x);
    });
}

// Tiles of all rows with several tokens, in order, then empty ones.
__device__ void list_tiles(const Arguments& a, Shared& shared) {
    uint32_t listed = 0;
    for (int base = 0; base < a.p.sequences; base += kThreads) {
        const int row = base + threadIdx.x;
        Row r{};
        if (row < a.p.sequences) r = read_row(a, row);
        // Tokens past the page table's end are not cached and not attended.
        const int count = r.count > 1 ? min(r.count, a.max_length - r.past) : 0;
        const uint32_t tiles = (count + kPrefillRows - 1) / kPrefillRows;
        uint32_t total;
        const uint32_t before = listed + exclusive_scan(tiles, shared.scan, total);
        for (uint32_t i = 0; i < tiles && before + i < static_cast<uint32_t>(a.prefill_tiles); i++) {
            const int start = static_cast<int>(i) * kPrefillRows;
            a.prefill_tile[before + i] =
                PrefillTile{row, r.first + start, min(kPrefillRows, count - start), r.past + start};
        }
        listed += total;
    }
    for (uint32_t i = listed + threadIdx.x; i < static_cast<uint32_t>(a.prefill_tiles); i += kThreads) {
        a.prefill_tile[i] = PrefillTile{};
    }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void append_kernel(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    const AppendGrid grid(a);
    int block = blockIdx.x;
    if (block < grid.key_blocks) {
        append_keys<T>(a, grid, shared, block);
    } else if ((block -= grid.key_blocks) < grid.item_blocks) {
        prepare_item<T>(a, grid, shared, block);
    } else {
        list_tiles(a, shared);
    }
}

}  // namespace

cudaError_t launch_append(const Arguments& a, cudaStream_t stream) {
    const AppendGrid grid(a);
    const Launch launch(dim3(grid.key_blocks + grid.item_blocks + grid.tile_blocks), dim3(kThreads), 0, stream);
    return a.p.dtype == SOCKET_TRT_FLOAT16 ? launch(append_kernel<__half>, a) : launch(append_kernel<__nv_bfloat16>, a);
}

}  // namespace socket_trt
