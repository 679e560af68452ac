// First kernel of the operator: everything that later kernels read.
//
// Key blocks write a tile of new keys into the cache: keys and values as they are, the values' norms, and the keys'
// hash codes.  Query blocks turn decode queries into the probability of every hyperplane's positive side.  One block
// describes the decode queries (Item) and lists the tiles of prefill chunks.
//
// Keys and queries are projected alike, as a product [planes, D] x [D, vectors] of tensor cores: a warp takes 16 planes
// and eight vectors at a time.  A dot product does not mind the order of its terms, so that lanes load both operands
// from global memory in pieces of 16 bytes and need no shared memory.
#include "device.cuh"
#include "launchers.h"
#include "mma.cuh"

namespace socket_trt {
namespace {

constexpr int kProjecting = 256;            // threads of a block that project
constexpr int kThreads = kProjecting + 32;  // the last warp finds cache slots meanwhile
constexpr int kBlockPlanes = kProjecting / 32 * 16;
constexpr int kQueryVectors = 8;  // of a query block

// Steps with at most a token for each sequence have a kernel of their own: later kernels wait for all of it, and it
// takes half the registers and less arithmetic.
struct FewTokens {
    static constexpr int kKeyVectors = 8;  // of a key block
    using Index = uint32_t;                // of a vector: at most 65535 tokens of 65535 heads
};
struct ManyTokens {
    static constexpr int kKeyVectors = 64;
    using Index = int64_t;
};

template <typename Size>
struct AppendGrid {
    int tables_per_block, chunks;  // a block projects on the planes of this many tables
    int key_blocks, query_blocks;  // and one block more

    __host__ __device__ explicit AppendGrid(const Arguments& a) {
        tables_per_block = kBlockPlanes / a.p.planes_per_table;
        chunks = (a.p.tables + tables_per_block - 1) / tables_per_block;
        const int64_t keys = static_cast<int64_t>(a.p.tokens) * a.p.kv_heads;
        key_blocks = static_cast<int>((keys + Size::kKeyVectors - 1) / Size::kKeyVectors) * chunks;
        const int64_t queries = a.sparse ? static_cast<int64_t>(a.items) * a.p.query_heads : 0;
        query_blocks = static_cast<int>((queries + kQueryVectors - 1) / kQueryVectors) * chunks;
    }
};

template <typename Size>
struct Shared {
    uint8_t bits[Size::kKeyVectors][kBlockPlanes];
    int row[Size::kKeyVectors];
    int64_t slot[Size::kKeyVectors];  // page * page_size + place in the page; -1: not cached
    uint32_t scan[33];
};

// The tables of a block, and its warp's rows among their planes.
struct Chunk {
    int first_table, tables, planes;

    template <typename Size>
    __device__ Chunk(const Arguments& a, const AppendGrid<Size>& grid, int index) {
        first_table = index * grid.tables_per_block;
        tables = min(grid.tables_per_block, a.p.tables - first_table);
        planes = tables * a.p.planes_per_table;
    }
};

// use(vector, plane of the chunk, projection) for TILES * 8 vectors; source(i): vector i, or nullptr for zeros.
template <typename T, int TILES, typename Source, typename Use>
__device__ __forceinline__ void project(const Arguments& a, const Chunk& chunk, Source source, Use use) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, size = a.p.head_size;
    const int plane = (threadIdx.x >> 5) * 16 + g;
    if (plane - g >= chunk.planes) return;
    const T* planes = static_cast<const T*>(a.p.planes) +
                      static_cast<int64_t>(chunk.first_table) * a.p.planes_per_table * size + t * 8;
    const T* low = planes + min(plane, chunk.planes - 1) * size;
    const T* high = planes + min(plane + 8, chunk.planes - 1) * size;
    const T* vector[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) vector[i] = source(i * 8 + g);
    float sum[TILES][4] = {};
#pragma unroll 4
    for (int d = 0; d < size; d += 32) {
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(low + d));
        const uint4 y = __ldg(reinterpret_cast<const uint4*>(high + d));
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (vector[i] != nullptr) v = __ldg(reinterpret_cast<const uint4*>(vector[i] + t * 8 + d));
            multiply<T>(sum[i], {x.x, y.x, x.y, y.y}, {v.x, v.y});
            multiply<T>(sum[i], {x.z, y.z, x.w, y.w}, {v.z, v.w});
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int at = plane + (c >> 1) * 8;
            if (at < chunk.planes) use(i * 8 + 2 * t + (c & 1), at, sum[i][c]);
        }
    }
}

// Where the tile's tokens go, as one warp finds it: the cache slot of each vector.
template <typename Size>
__device__ void find_slots(const Arguments& a, Shared<Size>& shared, typename Size::Index first, int count) {
    const int lane = threadIdx.x & 31;
    for (int i = lane; i < count; i += 32) shared.row[i] = -1;
    __syncwarp();
    for (int row = lane; row < a.p.sequences; row += 32) {
        const Row r = read_row(a, row);
        for (int i = 0; i < count; i++) {
            const int token = static_cast<int>((first + i) % a.p.tokens);
            if (r.first <= token && token < r.first + r.count) shared.row[i] = row;
        }
    }
    __syncwarp();
    for (int i = lane; i < count; i += 32) {
        const int row = shared.row[i];
        int64_t slot = -1;
        if (row >= 0) {
            const Row r = read_row(a, row);
            const int64_t position = static_cast<int64_t>(r.past) + (first + i) % a.p.tokens - r.first;
            if (position < a.max_length) {
                const int page =
                    a.p.page_table[static_cast<int64_t>(row) * a.p.pages_per_sequence + (position >> a.page_shift)];
                if (static_cast<uint32_t>(page) < static_cast<uint32_t>(a.p.pages)) {
                    slot = (static_cast<int64_t>(page) << a.page_shift) + (position & (a.p.page_size - 1));
                }
            }
        }
        shared.slot[i] = slot;
    }
}

// Keys, values and norms into the cache; zeros to the output of tokens that belong to no sequence.
template <typename T, typename Size>
__device__ void copy_tile(const Arguments& a, const Shared<Size>& shared, typename Size::Index first, int count) {
    const int size = a.p.head_size, pieces = size / 8;
    const int64_t first_piece = static_cast<int64_t>(first) * pieces;
    const uint4* key = static_cast<const uint4*>(a.p.key) + first_piece;
    const uint4* value = static_cast<const uint4*>(a.p.value) + first_piece;
    for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
        const int v = i / pieces, piece = i % pieces, head = static_cast<int>((first + v) / a.p.tokens);
        if (shared.slot[v] >= 0) {
            const int64_t to = cache_index(a, shared.slot[v], head) * pieces + piece;
            static_cast<uint4*>(a.p.key_cache)[to] = key[i];
            static_cast<uint4*>(a.p.value_cache)[to] = value[i];
        }
        if (shared.row[v] < 0) {
            for (int g = 0; g < a.group; g++) {
                const int64_t to = static_cast<int64_t>(head * a.group + g) * a.p.tokens + (first + v) % a.p.tokens;
                static_cast<uint4*>(a.p.output)[to * pieces + piece] = make_uint4(0, 0, 0, 0);
            }
        }
    }
    for (int v = threadIdx.x >> 5; v < count; v += kThreads / 32) {
        const T* from = static_cast<const T*>(a.p.value) + static_cast<int64_t>(first + v) * size;
        float sum = 0.f;
        for (int d = threadIdx.x & 31; d < size; d += 32) {
            const float x = to_float(from[d]);
            sum += x * x;
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if ((threadIdx.x & 31) == 0 && shared.slot[v] >= 0) {
            const int64_t to = cache_index(a, shared.slot[v], static_cast<int>((first + v) / a.p.tokens));
            static_cast<T*>(a.p.norm_cache)[to] = from_float<T>(sqrtf(sum));
        }
    }
}

// A tile of keys, [Hkv, N, D] read as a list of vectors.
template <typename T, typename Size>
__device__ void append_keys(const Arguments& a, const AppendGrid<Size>& grid, Shared<Size>& shared, int block) {
    const Chunk chunk(a, grid, block % grid.chunks);
    using Index = typename Size::Index;
    const Index first = static_cast<Index>(block / grid.chunks) * Size::kKeyVectors;
    const Index vectors = static_cast<Index>(a.p.tokens) * a.p.kv_heads;
    const int count = static_cast<int>(min(static_cast<Index>(Size::kKeyVectors), vectors - first));
    const T* key = static_cast<const T*>(a.p.key) + static_cast<int64_t>(first) * a.p.head_size;
    if (threadIdx.x < kProjecting) {
        project<T, Size::kKeyVectors / 8>(
            a, chunk, [&](int v) { return v < count ? key + v * a.p.head_size : nullptr; },
            [&](int v, int plane, float x) { shared.bits[v][plane] = x >= 0.f; });
    } else {
        find_slots(a, shared, first, count);
    }
    __syncthreads();
    if (chunk.first_table == 0) copy_tile<T>(a, shared, first, count);
    const int rank = a.p.planes_per_table;
    for (int i = threadIdx.x; i < count * chunk.tables; i += kThreads) {
        const int v = i / chunk.tables, t = i % chunk.tables;
        const int64_t slot = shared.slot[v];
        if (slot < 0) continue;
        uint32_t code = 0;
        for (int r = 0; r < rank; r++) code = code * 2 + shared.bits[v][t * rank + r];
        const int64_t page_head = (slot >> a.page_shift) * a.p.kv_heads + (first + v) / a.p.tokens;
        const int64_t to =
            ((page_head * a.p.tables + chunk.first_table + t) << a.page_shift) + (slot & (a.p.page_size - 1));
        if (a.code_bytes == 1) {
            static_cast<uint8_t*>(a.p.code_cache)[to] = static_cast<uint8_t>(code);
        } else {
            static_cast<uint16_t*>(a.p.code_cache)[to] = static_cast<uint16_t>(code);
        }
    }
}

// Eight query heads of decode queries.  A plane's positive side has probability sigmoid(2 tanh(w . q) / (sqrt(D) tau)).
template <typename T, typename Size>
__device__ void project_queries(const Arguments& a, const AppendGrid<Size>& grid, int block) {
    if (threadIdx.x >= kProjecting) return;
    const Chunk chunk(a, grid, block % grid.chunks);
    using Index = typename Size::Index;
    const Index first = static_cast<Index>(block / grid.chunks) * kQueryVectors;
    const Index vectors = static_cast<Index>(a.items) * a.p.query_heads;
    const auto source = [&](int v) -> const T* {
        if (first + v >= vectors) return nullptr;
        const int item = static_cast<int>((first + v) / a.p.query_heads);
        int token = item;
        if (!a.items_are_tokens) {
            const Row r = read_row(a, item);
            if (r.count == 0) return nullptr;
            token = r.first;
        }
        const int64_t head = (first + v) % a.p.query_heads;
        return static_cast<const T*>(a.p.query) + (head * a.p.tokens + token) * a.p.head_size;
    };
    const int rank = a.p.planes_per_table;
    const float factor = 2.f / (sqrtf(static_cast<float>(a.p.head_size)) * a.p.temperature);
    project<T, 1>(a, chunk, source, [&](int v, int plane, float x) {
        if (first + v >= vectors) return;
        const int table = chunk.first_table + plane / rank, r = plane % rank;
        a.probability[(static_cast<int64_t>(first + v) * rank + r) * a.p.tables + table] =
            1.f / (1.f + __expf(-factor * tanhf(x)));
    });
}

// Tiles of all rows with several tokens, in order, then empty ones.
template <typename Size>
__device__ void list_tiles(const Arguments& a, Shared<Size>& shared) {
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

template <typename T, typename Size>
__global__ __launch_bounds__(kThreads, 1) void append_kernel(const __grid_constant__ Arguments a) {
    __shared__ Shared<Size> shared;
    const AppendGrid<Size> grid(a);
    start_next_kernel();
    int block = blockIdx.x;
    if (block == 0) {
        for (int i = threadIdx.x; i < a.items; i += kThreads) a.item[i] = read_item(a, i);
        if (a.combined) {
            for (int i = threadIdx.x; i < a.items * a.select_heads; i += kThreads) a.arrived[i] = 0;
        }
        if (a.prefill_tiles > 0) list_tiles(a, shared);
    } else if ((block -= 1) < grid.query_blocks) {
        project_queries<T>(a, grid, block);
    } else {
        append_keys<T>(a, grid, shared, block - grid.query_blocks);
    }
}

template <typename Size>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
    const AppendGrid<Size> grid(a);
    const auto kernel =
        a.p.dtype == SOCKET_TRT_FLOAT16 ? append_kernel<__half, Size> : append_kernel<__nv_bfloat16, Size>;
    const cudaError_t status = set_up(kernel, 0);
    if (status != cudaSuccess) return status;
    const Launch launch(dim3(1 + grid.query_blocks + grid.key_blocks), dim3(kThreads), 0, stream);
    return launch(kernel, a);
}

}  // namespace

cudaError_t launch_append(const Arguments& a, cudaStream_t stream) {
    return a.p.tokens > a.p.sequences ? launch<ManyTokens>(a, stream) : launch<FewTokens>(a, stream);
}

}  // namespace socket_trt
