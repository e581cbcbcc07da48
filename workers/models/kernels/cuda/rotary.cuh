// Two-dimensional rotary positions and the write of one head's key and value to the cache, by one warp.
// Lane i < HEAD_DIM / 4 holds the values i of the four quarters of a head. Given at compile time: HEAD_DIM, KV_INT8.
#pragma once
#include "device.cuh"

constexpr int QUARTER = HEAD_DIM / 4;
static_assert(QUARTER <= WARP && HEAD_DIM % 16 == 0);

struct Quarters {
    float value[4];
};

DEVICE Quarters load_quarters(const u16* head, int lane) {
    Quarters out = {};
    if (lane < QUARTER) {
#pragma unroll
        for (int i = 0; i < 4; i++) out.value[i] = to_float(head[i * QUARTER + lane]);
    }
    return out;
}

// The first half turns by the angle of `first`, the second by that of `second` (rows of the tables); rounded to fp16.
DEVICE Quarters rotate(const Quarters& x, const float* cos_table, const float* sin_table, i64 first, i64 second, int lane) {
    Quarters out = {};
    if (lane < QUARTER) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const i64 at = (half == 0 ? first : second) * QUARTER + lane;
            const float c = cos_table[at], s = sin_table[at];
            const float a = x.value[half * 2], b = x.value[half * 2 + 1];
            out.value[half * 2] = to_float(to_half(a * c - b * s));
            out.value[half * 2 + 1] = to_float(to_half(b * c + a * s));
        }
    }
    return out;
}

DEVICE void store_quarters(const Quarters& x, u16* head, int lane) {
    if (lane < QUARTER) {
#pragma unroll
        for (int i = 0; i < 4; i++) head[i * QUARTER + lane] = to_half(x.value[i]);
    }
}

// `vector`: index of this token's head in the cache, [block][head][offset]. In int8: value = byte * scale.
DEVICE void store_in_cache(const Quarters& x, void* cache, u16* cache_scales, i64 vector, int lane) {
#if KV_INT8
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(x.value[i]));
    const u16 scale_bits = to_half(warp_max(largest) / 127.0f);
    const float scale = to_float(scale_bits);
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (lane == 0) cache_scales[vector] = scale_bits;
    if (lane < QUARTER) {
        signed char* out = reinterpret_cast<signed char*>(cache) + vector * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[i * QUARTER + lane] = (signed char)max(-127, min(127, __float2int_rn(x.value[i] * inverse)));
    }
#else
    store_quarters(x, reinterpret_cast<u16*>(cache) + vector * HEAD_DIM, lane);
#endif
}
