// Softmax averages of parts of the tokens, joined.
#ifndef SOCKET_TRT_COMBINE_PARTS_CUH_
#define SOCKET_TRT_COMBINE_PARTS_CUH_

#include <cmath>

#include "device.cuh"

namespace socket_trt {

// An element of an average: the weights' maximum (base 2), their sum and the weighted sum of values, both relative to
// it.
struct Average {
    float maximum, sum, output;

    __device__ __forceinline__ float value() const { return sum > 0.f ? output / sum : 0.f; }
};

// stats(i): maximum and sum of part i, sum 0 where it has no tokens; value(i): its weighted sum, looked at if it has
// any.
template <typename Stats, typename Value>
__device__ __forceinline__ Average combine_parts(int parts, Stats stats, Value value) {
    constexpr int kAtOnce = 8;
    Average all{-INFINITY, 0.f, 0.f};
    for (int first = 0; first < parts; first += kAtOnce) {
        float2 part[kAtOnce];
        float own[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {  // all loads before anything waits for one
            const bool exists = first + i < parts;
            part[i] = exists ? stats(first + i) : make_float2(-INFINITY, 0.f);
            own[i] = exists ? value(first + i) : 0.f;
        }
        float maximum = all.maximum;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) maximum = fmaxf(maximum, part[i].x);
        if (maximum == -INFINITY) continue;
        const float factor = exp2f(all.maximum - maximum);
        all = Average{maximum, all.sum * factor, all.output * factor};
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (part[i].y > 0.f) {  // a part without tokens has written no output
                const float weight = exp2f(part[i].x - maximum);
                all.sum += weight * part[i].y;
                all.output += weight * own[i];
            }
        }
    }
    return all;
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_COMBINE_PARTS_CUH_
