// SocketAttention: the checks, the workspace, and the order of the stages.  The C interface ends here.
#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "launch.h"
#include "launchers.h"
#include "socket_trt/kernels.h"

namespace socket_trt {
namespace {

thread_local char last_error[512] = "";

int32_t fail(int32_t status, const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(last_error, sizeof(last_error), format, values);
    va_end(values);
    return status;
}

int32_t cuda_failure(const char* what, cudaError_t status) {
    return fail(SOCKET_TRT_CUDA_ERROR, "%s: %s", what, cudaGetErrorString(status));
}

bool is_power_of_two(int32_t x) {
    return x > 0 && (x & (x - 1)) == 0;
}

int32_t check_shapes(const SocketTrtAttentionParams* params) {
    if (params == nullptr) return fail(SOCKET_TRT_INVALID_ARGUMENT, "params is null");
    if (params->struct_size != sizeof(SocketTrtAttentionParams)) {
        return fail(SOCKET_TRT_INVALID_ARGUMENT, "struct_size is %u, this library (ABI %d) expects %zu",
                    params->struct_size, SOCKET_TRT_ABI_VERSION, sizeof(SocketTrtAttentionParams));
    }
    const SocketTrtAttentionParams& p = *params;
    struct Range {
        const char* name;
        int64_t value, low, high;
    };
    const Range ranges[] = {
        {"dtype", p.dtype, SOCKET_TRT_FLOAT16, SOCKET_TRT_BFLOAT16},
        {"tokens", p.tokens, 0, INT32_MAX / 2},
        {"sequences", p.sequences, 0, 65535},
        {"kv_heads", p.kv_heads, 1, 65535},
        {"query_heads", p.query_heads, 1, 65535},
        {"pages", p.pages, 1, INT32_MAX},
        {"page_size", p.page_size, 16, 256},
        {"pages_per_sequence", p.pages_per_sequence, 1, INT32_MAX},
        {"tables", p.tables, 1, 128},
        {"planes_per_table", p.planes_per_table, 1, 16},
        {"sink", p.sink, 0, INT32_MAX},
        {"window", p.window, 0, INT32_MAX},
        {"budget_tokens", p.budget_tokens, 0, INT32_MAX},
        {"budget_permille", p.budget_permille, 0, 1000},
        {"min_length", p.min_length, 0, INT32_MAX},
        {"selection", p.selection, SOCKET_TRT_QUERY_HEAD, SOCKET_TRT_KV_HEAD},
    };
    for (const Range& r : ranges) {
        if (r.value < r.low || r.value > r.high) {
            return fail(SOCKET_TRT_INVALID_ARGUMENT, "%s is %lld, expected %lld to %lld", r.name,
                        static_cast<long long>(r.value), static_cast<long long>(r.low), static_cast<long long>(r.high));
        }
    }
    if (!is_power_of_two(p.page_size)) {
        return fail(SOCKET_TRT_INVALID_ARGUMENT, "page_size is %d, expected a power of two", p.page_size);
    }
    if (p.query_heads % p.kv_heads != 0 || p.query_heads / p.kv_heads > 16) {
        return fail(SOCKET_TRT_INVALID_ARGUMENT, "%d query heads over %d KV heads: expected 1 to 16 each",
                    p.query_heads, p.kv_heads);
    }
    if (!(p.temperature > 0.f)) {
        return fail(SOCKET_TRT_INVALID_ARGUMENT, "temperature is %g, expected more than 0", p.temperature);
    }
    if (p.head_size != 64 && p.head_size != 96 && p.head_size != 128 && p.head_size != 256) {
        return fail(SOCKET_TRT_UNSUPPORTED, "head_size is %d, this library has kernels for 64, 96, 128 and 256",
                    p.head_size);
    }
    // Positions take 27 bits of a word of the selection, cache slots 31 bits of the list.
    if (static_cast<int64_t>(p.pages_per_sequence) * p.page_size > 1 << 27) {
        return fail(SOCKET_TRT_UNSUPPORTED, "%d pages of %d tokens a sequence: at most %d tokens", p.pages_per_sequence,
                    p.page_size, 1 << 27);
    }
    if (static_cast<int64_t>(p.pages) * p.page_size > INT32_MAX) {
        return fail(SOCKET_TRT_UNSUPPORTED, "a pool of %d pages of %d tokens: at most 2^31 - 1 tokens", p.pages,
                    p.page_size);
    }
    // Tiles of prompts lie along the second axis of a grid.
    if (p.tokens / kPrefillRows + static_cast<int64_t>(p.sequences) > 65535) {
        return fail(SOCKET_TRT_UNSUPPORTED,
                    "a step of %d tokens of %d sequences: at most 65535 sequences and tiles of %d", p.tokens,
                    p.sequences, kPrefillRows);
    }
    return SOCKET_TRT_SUCCESS;
}

int32_t check_pointers(const SocketTrtAttentionParams& p) {
    struct Tensor {
        const char* name;
        const void* data;
        uintptr_t alignment;
    };
    const Tensor tensors[] = {
        {"query", p.query, 16},
        {"key", p.key, 16},
        {"value", p.value, 16},
        {"key_cache", p.key_cache, 16},
        {"value_cache", p.value_cache, 16},
        {"code_cache", p.code_cache, 16},
        {"norm_cache", p.norm_cache, 16},
        {"page_table", p.page_table, 4},
        {"past_length", p.past_length, 4},
        {"query_start", p.query_start, 4},
        {"planes", p.planes, 16},
        {"output", p.output, 16},
        {"workspace", p.workspace, 256},
    };
    for (const Tensor& tensor : tensors) {
        if (tensor.data == nullptr) return fail(SOCKET_TRT_INVALID_ARGUMENT, "%s is null", tensor.name);
        if (reinterpret_cast<uintptr_t>(tensor.data) % tensor.alignment != 0) {
            return fail(SOCKET_TRT_INVALID_ARGUMENT, "%s is not aligned to %zu bytes", tensor.name,
                        static_cast<size_t>(tensor.alignment));
        }
    }
    return SOCKET_TRT_SUCCESS;
}

cudaError_t describe_device(int ordinal, Device& device) {
    int major = 0, minor = 0;
    const struct {
        int* to;
        cudaDeviceAttr what;
    } attributes[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                      {&minor, cudaDevAttrComputeCapabilityMinor},
                      {&device.multiprocessors, cudaDevAttrMultiProcessorCount},
                      {&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                      {&device.cache, cudaDevAttrL2CacheSize}};
    for (const auto& attribute : attributes) {
        const cudaError_t status = cudaDeviceGetAttribute(attribute.to, attribute.what, ordinal);
        if (status != cudaSuccess) return status;
    }
    device.ordinal = ordinal;
    device.architecture = major * 10 + minor;
    count_clusters(device);
    return cudaSuccess;
}

// The current device; where there is none, an H200 without an ordinal, so that sizes can be asked for anywhere.
cudaError_t current_device(Device& device) {
    struct Known {
        std::once_flag once;
        cudaError_t status;
        Device device;
    };
    static std::array<Known, kMaxDevices> known;
    device = Device{-1, 90, 132, 232448, 50 << 20, {0, 132, 66, 39, 30, 22, 17, 15, 15}};
    int ordinal;
    const cudaError_t status = cudaGetDevice(&ordinal);
    if (status != cudaSuccess) return status;
    if (ordinal < 0 || ordinal >= kMaxDevices) return cudaErrorInvalidDevice;
    Known& this_one = known[ordinal];
    std::call_once(this_one.once, [&] { this_one.status = describe_device(ordinal, this_one.device); });
    if (this_one.status == cudaSuccess) device = this_one.device;
    return this_one.status;
}

// The kernel that attends densely.
const char* dense_kernel(const SocketTrtAttentionParams& p) {
    return p.page_size >= 64 ? "decode_dense_64" : "decode_dense_16";
}

// Programs of the dense kernel that a multiprocessor has room for.
int dense_programs(const SocketTrtAttentionParams& p, const Device& device) {
    constexpr int kMost = 4;  // as far as registers go for any head size
    const EmbeddedKernel* kernel = find_kernel(dense_kernel(p), p.dtype, p.head_size, device.architecture);
    const int each = kernel == nullptr ? device.shared_memory : kernel->shared_memory + kSystemShared;
    return std::clamp((device.shared_memory + kSystemShared) / each, 1, kMost);
}

// Parts of `tokens` that one item and set of heads is attended to in, none of less than `least`, where a multiprocessor
// has `programs` at once.
int plan_splits(const Device& device, int programs, int64_t sets, int64_t tokens, int least) {
    if (sets < 1) return 1;      // a step without tokens
    constexpr int kStart = 256;  // what it costs to start one, in tokens
    const int64_t most = std::min<int64_t>((tokens + least - 1) / least, kMaxSplits);
    return best_parts(sets, programs * device.multiprocessors, most, static_cast<double>(tokens), kStart);
}

// Hands out the workspace piece by piece; with a null base it only counts.
class Arena {
  public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
    template <typename T>
    void take(T*& to, int64_t count) {
        to = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    }
    uint64_t used() const { return static_cast<uint64_t>(used_); }

  private:
    char* base_;
    int64_t used_ = 0;
};

struct Plan {
    Arguments arguments;
    ScorePlan score{};
    uint64_t workspace_bytes;
};

uint32_t stages_of(const SocketTrtAttentionParams& p) {
    return p.stages == 0 ? ~0u : p.stages;
}

int32_t make_plan(const SocketTrtAttentionParams& p, const Device& device, Plan& plan) {
    Arguments& a = plan.arguments;
    a = Arguments{};
    a.p = p;
    a.group = p.query_heads / p.kv_heads;
    while (1 << a.page_shift < p.page_size) a.page_shift++;
    a.code_bytes = p.planes_per_table <= 8 ? 1 : 2;
    a.max_length = p.pages_per_sequence * p.page_size;
    a.items_are_tokens = p.tokens <= p.sequences;
    a.items = a.items_are_tokens ? p.tokens : p.sequences;
    a.sparse = p.min_length < a.max_length;
    a.select_heads = p.selection == SOCKET_TRT_KV_HEAD ? p.kv_heads : p.query_heads;
    a.combined = a.sparse && a.select_heads == p.query_heads;
    // Kernels look at the inputs before the one in front of them has ended: that has to be append, not what made them.
    a.overlapped = device.architecture >= 90 && (stages_of(p) & SOCKET_TRT_STAGE_APPEND) != 0;
    a.prefill_tiles = a.items_are_tokens ? 0 : p.tokens / kPrefillRows + p.sequences;

    const int64_t length = a.max_length;
    const int64_t share = (length * p.budget_permille + 999) / 1000;
    int64_t listed = (share > p.budget_tokens ? share : p.budget_tokens) + static_cast<int64_t>(p.sink) + p.window;
    if (listed > length) listed = length;
    a.key_stride = static_cast<int32_t>((length + kScoreUnit - 1) / kScoreUnit * kScoreUnit);
    a.list_stride = static_cast<int32_t>((listed + 63) / 64 * 64);
    const int64_t dense_sets = static_cast<int64_t>(a.items) * p.kv_heads;
    const int64_t sparse_sets = static_cast<int64_t>(a.items) * a.select_heads;
    a.dense_splits = plan_splits(device, dense_programs(p, device), dense_sets, length, 256);
    // A third sparse program would find room, too, but lists are no faster in more parts.
    a.sparse_splits = a.sparse ? plan_splits(device, 2, sparse_sets, listed, 128) : 0;

    if (a.sparse && a.items > 0) {
        plan.score = plan_score(a, device);
        plan_select(a, device);
        plan_select_attend(a, device);
    }
    const int64_t selecting = a.sparse ? static_cast<int64_t>(a.items) * a.select_heads : 0;
    const int64_t heads = static_cast<int64_t>(a.items) * p.query_heads;
    const int splits = a.dense_splits > a.sparse_splits ? a.dense_splits : a.sparse_splits;
    Arena arena(p.workspace);
    arena.take(a.item, a.items);
    arena.take(a.prefill_tile, a.prefill_tiles);
    arena.take(a.probability, a.sparse ? heads * p.tables * p.planes_per_table : 0);
    arena.take(a.listed, selecting);
    arena.take(a.score_key, selecting * a.key_stride);
    arena.take(a.sample_key, selecting * (a.key_stride / kSampleTokens));
    char* partial;
    arena.take(partial, plan.score.partial_bytes);
    a.score_partial = partial;
    arena.take(a.slot, selecting * a.list_stride);
    arena.take(a.arrived, a.combined ? selecting : 0);
    arena.take(a.partial_output, heads * splits * p.head_size);
    arena.take(a.partial_stats, heads * splits * 2);
    plan.workspace_bytes = arena.used() > 0 ? arena.used() : 256;
    return SOCKET_TRT_SUCCESS;
}

cudaError_t launch_decode(const Arguments& a, const Device& device, bool sparse, cudaStream_t stream) {
    const int32_t sets = sparse ? a.select_heads : a.p.kv_heads;
    const int32_t together = a.p.query_heads / sets;
    const int32_t split_stride = a.dense_splits > a.sparse_splits ? a.dense_splits : a.sparse_splits;
    const char* name = !sparse ? dense_kernel(a.p) : a.combined ? "decode_sparse_alone" : "decode_sparse";
    const dim3 grid(sparse ? a.sparse_splits : a.dense_splits, sets, a.items);
    const SocketTrtAttentionParams& p = a.p;
    const int32_t min_length = a.sparse ? p.min_length : INT32_MAX;
    return launch_embedded(
        name, p.dtype, p.head_size, device, grid, a.overlapped != 0, stream,
        {&p.query,       &p.key_cache, &p.value_cache, &p.page_table,     &p.past_length,        &p.query_start,
         &a.item,        &a.slot,      &a.listed,      &a.partial_output, &a.partial_stats,      &a.arrived,
         &p.output,      &p.scale,     &p.softcap,     &p.sliding_window, &min_length,           &p.tokens,
         &p.query_heads, &p.kv_heads,  &together,      &p.pages,          &p.pages_per_sequence, &a.page_shift,
         &a.list_stride, &split_stride});
}

cudaError_t launch_prefill(const Arguments& a, const Device& device, cudaStream_t stream) {
    const SocketTrtAttentionParams& p = a.p;
    const bool capped = p.softcap > 0.f;
    const char* name = p.page_size >= 64 ? capped ? "prefill_64_capped" : "prefill_64"
                       : capped          ? "prefill_16_capped"
                                         : "prefill_16";
    return launch_embedded(
        name, p.dtype, p.head_size, device, dim3(p.query_heads, a.prefill_tiles), false, stream,
        {&p.query, &p.key_cache, &p.value_cache, &p.page_table, &a.prefill_tile, &p.output, &p.scale, &p.softcap,
         &p.sliding_window, &p.tokens, &p.query_heads, &p.kv_heads, &p.pages, &p.pages_per_sequence, &a.page_shift});
}

int32_t run(const Plan& plan, const Device& device, cudaStream_t stream) {
    const Arguments& a = plan.arguments;
    const uint32_t stages = stages_of(a.p);
    // Dense items among sparse ones: short sequences, and several tokens of one sequence where every token is an item.
    const bool sparse = a.sparse && a.items > 0;
    const bool dense = a.items > 0 && (!a.sparse || a.p.min_length > 0 || (a.items_are_tokens && a.items > 1));
    const bool select = sparse && (stages & SOCKET_TRT_STAGE_SELECT) != 0;
    const bool attend = sparse && (stages & SOCKET_TRT_STAGE_ATTEND) != 0;
    const bool together = select && attend && a.select_attends;
    const struct {
        const char* name;
        bool wanted;
        cudaError_t (*launch)(const Plan&, const Device&, cudaStream_t);
    } order[] = {
        {"append", (stages & SOCKET_TRT_STAGE_APPEND) != 0,
         [](const Plan& x, const Device&, cudaStream_t s) { return launch_append(x.arguments, s); }},
        {"prefill", (stages & SOCKET_TRT_STAGE_PREFILL) != 0 && a.prefill_tiles > 0,
         [](const Plan& x, const Device& d, cudaStream_t s) { return launch_prefill(x.arguments, d, s); }},
        {"score", (stages & SOCKET_TRT_STAGE_SCORE) != 0 && sparse,
         [](const Plan& x, const Device&, cudaStream_t s) { return launch_score(x.arguments, x.score, s); }},
        {"select and attend", together,
         [](const Plan& x, const Device&, cudaStream_t s) { return launch_select_attend(x.arguments, s); }},
        {"select", select && !together,
         [](const Plan& x, const Device&, cudaStream_t s) { return launch_select(x.arguments, s); }},
        {"sparse decode", attend && !together,
         [](const Plan& x, const Device& d, cudaStream_t s) { return launch_decode(x.arguments, d, true, s); }},
        {"dense decode", (stages & SOCKET_TRT_STAGE_ATTEND) != 0 && dense,
         [](const Plan& x, const Device& d, cudaStream_t s) { return launch_decode(x.arguments, d, false, s); }},
        {"combine", (stages & SOCKET_TRT_STAGE_COMBINE) != 0 && a.items > 0 && (dense || !a.combined),
         [](const Plan& x, const Device&, cudaStream_t s) { return launch_combine(x.arguments, s); }},
    };
    for (const auto& stage : order) {
        if (!stage.wanted) continue;
        const cudaError_t status = stage.launch(plan, device, stream);
        if (status != cudaSuccess) return cuda_failure(stage.name, status);
    }
    return SOCKET_TRT_SUCCESS;
}

}  // namespace
}  // namespace socket_trt

using socket_trt::fail;

int32_t SocketTrtAbiVersion(void) {
    return SOCKET_TRT_ABI_VERSION;
}

const char* SocketTrtKernels(void) {
    static const std::string text = [] {
        std::string lines = "socket_trt_kernels " SOCKET_TRT_RELEASE " cuda " SOCKET_TRT_CUDA_ARCHITECTURES "\n";
        for (int i = 0; i < socket_trt::kEmbeddedKernelCount; i++) {
            const socket_trt::EmbeddedKernel& kernel = socket_trt::kEmbeddedKernels[i];
            lines += std::string(kernel.name) + " " +
                     (kernel.architecture == 0 ? "ptx" : "sm_" + std::to_string(kernel.architecture)) + " " +
                     (kernel.dtype == SOCKET_TRT_FLOAT16 ? "float16" : "bfloat16") + " " +
                     std::to_string(kernel.head_size) + "\n";
        }
        return lines;
    }();
    return text.c_str();
}

const char* SocketTrtStatusText(int32_t status) {
    switch (status) {
        case SOCKET_TRT_SUCCESS:
            return "success";
        case SOCKET_TRT_INVALID_ARGUMENT:
            return "invalid argument";
        case SOCKET_TRT_UNSUPPORTED:
            return "unsupported";
        case SOCKET_TRT_WORKSPACE_TOO_SMALL:
            return "workspace too small";
        case SOCKET_TRT_CUDA_ERROR:
            return "CUDA error";
        default:
            return "unknown status";
    }
}

const char* SocketTrtLastError(void) {
    return socket_trt::last_error;
}

int32_t SocketTrtPrepare(void) {
    socket_trt::Device device;
    cudaError_t status = socket_trt::current_device(device);
    if (status != cudaSuccess) return socket_trt::cuda_failure("current device", status);
    status = socket_trt::load_kernels(device);
    return status == cudaSuccess ? SOCKET_TRT_SUCCESS : socket_trt::cuda_failure("loading kernels", status);
}

int32_t SocketTrtAttentionWorkspace(const SocketTrtAttentionParams* params, uint64_t* bytes) {
    int32_t status = socket_trt::check_shapes(params);
    if (status != SOCKET_TRT_SUCCESS) return status;
    if (bytes == nullptr) return fail(SOCKET_TRT_INVALID_ARGUMENT, "bytes is null");
    socket_trt::Device device;
    (void)socket_trt::current_device(device);
    socket_trt::Plan plan;
    status = socket_trt::make_plan(*params, device, plan);
    if (status == SOCKET_TRT_SUCCESS) *bytes = plan.workspace_bytes;
    return status;
}

int32_t SocketTrtAttentionSelection(const SocketTrtAttentionParams* params, SocketTrtSelectionView* view) {
    int32_t status = socket_trt::check_shapes(params);
    if (status != SOCKET_TRT_SUCCESS) return status;
    if (view == nullptr) return fail(SOCKET_TRT_INVALID_ARGUMENT, "view is null");
    socket_trt::Device device;
    (void)socket_trt::current_device(device);
    SocketTrtAttentionParams based = *params;  // offsets are differences of addresses: any base will do
    based.workspace = reinterpret_cast<void*>(uintptr_t{256});
    socket_trt::Plan plan;
    status = socket_trt::make_plan(based, device, plan);
    if (status != SOCKET_TRT_SUCCESS) return status;
    const socket_trt::Arguments& a = plan.arguments;
    const char* base = static_cast<const char*>(based.workspace);
    view->slots_offset = reinterpret_cast<const char*>(a.slot) - base;
    view->counts_offset = reinterpret_cast<const char*>(a.listed) - base;
    view->items = a.items;
    view->heads = a.sparse ? a.select_heads : 0;
    view->list_stride = a.list_stride;
    return SOCKET_TRT_SUCCESS;
}

int32_t SocketTrtAttention(const SocketTrtAttentionParams* params, void* stream) {
    int32_t status = socket_trt::check_shapes(params);
    if (status != SOCKET_TRT_SUCCESS) return status;
    if (params->tokens == 0) return SOCKET_TRT_SUCCESS;
    status = socket_trt::check_pointers(*params);
    if (status != SOCKET_TRT_SUCCESS) return status;
    socket_trt::Device device;
    cudaError_t error = socket_trt::current_device(device);
    if (error != cudaSuccess) return socket_trt::cuda_failure("current device", error);
    socket_trt::Plan plan;
    status = socket_trt::make_plan(*params, device, plan);
    if (status != SOCKET_TRT_SUCCESS) return status;
    if (params->workspace_bytes < plan.workspace_bytes) {
        return fail(SOCKET_TRT_WORKSPACE_TOO_SMALL, "workspace has %llu bytes, the call needs %llu",
                    static_cast<unsigned long long>(params->workspace_bytes),
                    static_cast<unsigned long long>(plan.workspace_bytes));
    }
    error = socket_trt::load_kernels(device);
    if (error != cudaSuccess) return socket_trt::cuda_failure("loading kernels", error);
    return socket_trt::run(plan, device, static_cast<cudaStream_t>(stream));
}
