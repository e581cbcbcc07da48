// One new token of each sequence attends to its cache, in blocks. A grid block takes one sequence, one head and one part
// of the keys; the last part to end adds the parts up. The lanes of a warp form groups of HEAD_DIM / 16, each with keys,
// running maximum and sum of its own, so that nothing is shared until the end.
//
// FUSED: the input is the fused projection; this kernel rotates q and k, attends, and writes the new key and value to the
// cache. Otherwise q is rotated and the cache already holds the token; PROJECTION: q is still within the fused projection.
//
// Given at compile time: HEAD_DIM, NUM_HEADS, NUM_KV_HEADS (heads that share keys are neighbours), BLOCK_SIZE, MAX_BLOCKS, PARTS, PART_KEYS, WARPS, UNROLL, KV_INT8, FUSED, PROJECTION.
#include "device.cuh"
#include "rotary.cuh"

constexpr int LANES = HEAD_DIM / 16;
constexpr int GROUPS = WARPS * WARP / LANES;
constexpr int WIDTH = NUM_HEADS * HEAD_DIM;
constexpr int VECTORS = KV_INT8 ? 1 : 2;
constexpr float NOTHING = -1e30f;

static_assert(WARP % LANES == 0 && WARPS >= 3 && (!FUSED || NUM_KV_HEADS == NUM_HEADS));

// Dimension of value e (0..15) of a lane: its loads are 16 bytes wide and those of a group are contiguous.
DEVICE int dimension(int lane, int e) {
    if constexpr (KV_INT8) return lane * 16 + e;
    return e < 8 ? lane * 8 + e : HEAD_DIM / 2 + lane * 8 + e - 8;
}

DEVICE void load_vector(const void* cache, i64 vector, int lane, uint4 (&out)[VECTORS]) {
    const u8* source = reinterpret_cast<const u8*>(cache) + vector * (HEAD_DIM * (KV_INT8 ? 1 : 2)) + lane * 16;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) out[v] = load_streaming(source + v * HEAD_DIM);
}

DEVICE void widen(const uint4 (&in)[VECTORS], float (&out)[16]) {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const u32 words[4] = {in[v].x, in[v].y, in[v].z, in[v].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = to_float2(words[i]);
            out[v * 8 + i * 2] = pair.x, out[v * 8 + i * 2 + 1] = pair.y;
        }
    }
}

// This lane's 16 values of the query, ready for dot products with keys.
#if KV_INT8
// In 16-bit fixed point, high and low bytes apart: value = (256 high + low) * unit. Products with int8 keys are exact.
struct Query {
    u32 high[4], low[4];
    float unit;
};

DEVICE Query prepare(const float (&q)[16]) {
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < 16; e++) largest = fmaxf(largest, fabsf(q[e]));
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    Query out = {{}, {}, fmaxf(largest, 1e-30f) / 32512.0f};
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const int fixed = __float2int_rn(q[e] / out.unit);
        const int low = (signed char)fixed;
        out.low[e / 4] |= (u32)(low & 0xff) << e % 4 * 8;
        out.high[e / 4] |= (u32)((fixed - low) >> 8 & 0xff) << e % 4 * 8;
    }
    return out;
}

DEVICE int dot_bytes(u32 a, u32 b, int sum) {
    int out;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
    return out;
}

DEVICE float dot(const Query& q, const uint4 (&key)[VECTORS]) {
    const u32 words[4] = {key[0].x, key[0].y, key[0].z, key[0].w};
    int high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) high = dot_bytes(words[i], q.high[i], high), low = dot_bytes(words[i], q.low[i], low);
    int sum = high * 256 + low;
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return (float)sum * q.unit;
}
#else
struct Query {
    float value[16];
};

DEVICE Query prepare(const float (&q)[16]) {
    Query out;
#pragma unroll
    for (int e = 0; e < 16; e++) out.value[e] = q[e];
    return out;
}

DEVICE float dot(const Query& q, const uint4 (&key)[VECTORS]) {
    float value[16], sum = 0.0f;
    widen(key, value);
#pragma unroll
    for (int e = 0; e < 16; e++) sum += q.value[e] * value[e];
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
}
#endif

struct State {
    float maximum, sum, out[16];
};

// Adds the weighted values of up to COUNT keys with these scores (in powers of two) to a group's state. Values are
// value_scales * what is stored; a scale of 0 marks a key that is not there.
template <int COUNT>
DEVICE void accumulate(State& state, const float (&scores)[COUNT], const bool (&valid)[COUNT],
                       const float (&value_scales)[COUNT], const uint4 (&values)[COUNT][VECTORS]) {
    float maximum = state.maximum;
#pragma unroll
    for (int u = 0; u < COUNT; u++) maximum = fmaxf(maximum, scores[u]);
    const float rescale = exp2_fast(state.maximum - maximum);
    state.maximum = maximum;
    state.sum *= rescale;
    float weights[COUNT];
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
        weights[u] = valid[u] ? exp2_fast(scores[u] - maximum) : 0.0f;
        state.sum += weights[u];
    }
#if KV_INT8
    // The sum over these few keys is made in fp16 pairs, relative to the largest scale, and then added in fp32.
    float largest = 1e-30f;
#pragma unroll
    for (int u = 0; u < COUNT; u++) largest = fmaxf(largest, value_scales[u]);
    const float inverse = 1.0f / largest;
    u32 sums[8] = {};
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
        const float weight = weights[u] * (value_scales[u] * inverse);
        const u32 pair = to_half2(weight, weight);
        const u32 words[4] = {values[u][0].x, values[u][0].y, values[u][0].z, values[u][0].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 low, high;
            dequantize_int8(words[i] ^ 0x80808080u, low, high);
            sums[i * 2] = fma_half2(low, pair, sums[i * 2]);
            sums[i * 2 + 1] = fma_half2(high, pair, sums[i * 2 + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float2 sum = to_float2(sums[i]);
        state.out[i * 2] = state.out[i * 2] * rescale + sum.x * largest;
        state.out[i * 2 + 1] = state.out[i * 2 + 1] * rescale + sum.y * largest;
    }
#else
#pragma unroll
    for (int e = 0; e < 16; e++) state.out[e] *= rescale;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
        float value[16];
        widen(values[u], value);
#pragma unroll
        for (int e = 0; e < 16; e++) state.out[e] += weights[u] * value[e];
    }
#endif
}

DEVICE void merge(State& state, float maximum, float sum, const float (&out)[16]) {
    const float joint = fmaxf(state.maximum, maximum);
    const float own = exp2_fast(state.maximum - joint), other = exp2_fast(maximum - joint);
    state.maximum = joint;
    state.sum = state.sum * own + sum * other;
#pragma unroll
    for (int e = 0; e < 16; e++) state.out[e] = state.out[e] * own + out[e] * other;
}

// input: [B, 3 WIDTH] when FUSED, else q [B, WIDTH]. keys, values: [blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; scales
// without the last dimension. positions: [2, B]. partial: [B, NUM_HEADS, PARTS, HEAD_DIM + 2] and counters [B, NUM_HEADS],
// zero before and after, when PARTS > 1.
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
attend_decode(const u16* input, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
              const i64* __restrict__ positions, void* keys, void* values, u16* key_scales, u16* value_scales,
              const i64* __restrict__ slots, const int* __restrict__ block_tables, const int* __restrict__ kv_lens,
              u16* out, float* partial, int* counters, int max_blocks, float scale) {
    __shared__ int table[MAX_BLOCKS];
    __shared__ float query[HEAD_DIM], new_key[HEAD_DIM], new_value[HEAD_DIM];
    __shared__ float warp_maximum[WARPS], warp_total[WARPS], warp_out[WARPS][HEAD_DIM];
    __shared__ int is_last;

    const int head = blockIdx.x, row = blockIdx.y, part = blockIdx.z, num_rows = gridDim.y;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = threadIdx.x / LANES, group_lane = threadIdx.x % LANES;

    const int kv_len = kv_lens[row];
    int active = min(PARTS, (kv_len + PART_KEYS - 1) / PART_KEYS);
    const int keys_per_part = ((kv_len + active - 1) / active + BLOCK_SIZE - 1) / BLOCK_SIZE * BLOCK_SIZE;
    active = (kv_len + keys_per_part - 1) / keys_per_part;
    if (part >= active) {
        allow_next_kernel();
        return;
    }
    const int begin = part * keys_per_part;
    const int end = min(kv_len, begin + keys_per_part);
    const bool has_newest = FUSED && part == active - 1;
    const int cached_end = has_newest ? end - 1 : end;

    const int first_block = begin / BLOCK_SIZE;
    for (int i = threadIdx.x; i < (end + BLOCK_SIZE - 1) / BLOCK_SIZE - first_block; i += WARPS * WARP)
        table[i] = block_tables[(i64)row * max_blocks + first_block + i];
    __syncthreads();
    const auto vector_of = [&](int key) {
        const int kv_head = head / (NUM_HEADS / NUM_KV_HEADS);
        return ((i64)table[key / BLOCK_SIZE - first_block] * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE;
    };

    uint4 key_data[UNROLL][VECTORS], value_data[UNROLL][VECTORS];
    float key_scale[UNROLL], value_scale[UNROLL];
    const auto fetch = [&](int from) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int key = from + u * GROUPS + group;
            key_scale[u] = value_scale[u] = KV_INT8 ? 0.0f : 1.0f;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) key_data[u][v] = value_data[u][v] = make_uint4(0, 0, 0, 0);
            if (key < cached_end) {
                const i64 vector = vector_of(key);
                load_vector(keys, vector, group_lane, key_data[u]);
                load_vector(values, vector, group_lane, value_data[u]);
#if KV_INT8
                key_scale[u] = to_float(key_scales[vector]);
                value_scale[u] = to_float(value_scales[vector]);
#endif
            }
        }
    };
    // Older tokens were written by earlier passes, so their keys and values need not wait for the projection.
    if (FUSED) fetch(begin);
    allow_next_kernel();
    wait_for_previous_kernel();
    if (!FUSED) fetch(begin);

#if FUSED
    const u16* heads = input + (i64)row * 3 * WIDTH + head * 3 * HEAD_DIM;
    const i64 first = positions[row], second = positions[num_rows + row];
    if (warp == 0) {
        const Quarters q = rotate(load_quarters(heads, lane), cos_table, sin_table, first, second, lane);
        if (lane < QUARTER) {
#pragma unroll
            for (int i = 0; i < 4; i++) query[i * QUARTER + lane] = q.value[i];
        }
    } else if (warp <= 2 && has_newest) {
        Quarters x = load_quarters(heads + warp * HEAD_DIM, lane);
        if (warp == 1) x = rotate(x, cos_table, sin_table, first, second, lane);
        const i64 slot = slots[row];
        const i64 vector = (slot / BLOCK_SIZE * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE;
        store_in_cache(x, warp == 1 ? keys : values, warp == 1 ? key_scales : value_scales, vector, lane);
        float* shared = warp == 1 ? new_key : new_value;
        if (lane < QUARTER) {
#pragma unroll
            for (int i = 0; i < 4; i++) shared[i * QUARTER + lane] = x.value[i];
        }
    }
#else
    for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * WARP)
        query[d] = to_float(input[((i64)row * NUM_HEADS + head) * (PROJECTION ? 3 : 1) * HEAD_DIM + d]);
#endif
    __syncthreads();

    float q[16];
#pragma unroll
    for (int e = 0; e < 16; e++) q[e] = query[dimension(group_lane, e)] * (scale * 1.4426950408889634f);
    const Query prepared = prepare(q);
    State state = {NOTHING, 0.0f, {}};
    if (has_newest && warp == 0) {
        float score = 0.0f, value[16];
#pragma unroll
        for (int e = 0; e < 16; e++) score += q[e] * new_key[dimension(group_lane, e)];
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffu, score, offset);
#pragma unroll
        for (int e = 0; e < 16; e++) value[e] = new_value[dimension(group_lane, e)];
        if (group == 0) merge(state, score, 1.0f, value);
    }

    for (int from = begin; from < cached_end; from += GROUPS * UNROLL) {
        if (from != begin) fetch(from);
        float scores[UNROLL];
        bool valid[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            valid[u] = from + u * GROUPS + group < cached_end;
            const float score = dot(prepared, key_data[u]) * key_scale[u];
            scores[u] = valid[u] ? score : NOTHING;
        }
        accumulate<UNROLL>(state, scores, valid, value_scale, value_data);
    }
    // Groups of a warp, then warps.
#pragma unroll
    for (int offset = LANES; offset < WARP; offset *= 2) {
        float other[16];
        const float maximum = __shfl_xor_sync(0xffffffffu, state.maximum, offset);
        const float sum = __shfl_xor_sync(0xffffffffu, state.sum, offset);
#pragma unroll
        for (int e = 0; e < 16; e++) other[e] = __shfl_xor_sync(0xffffffffu, state.out[e], offset);
        merge(state, maximum, sum, other);
    }
    if (lane < LANES) {
        if (lane == 0) warp_maximum[warp] = state.maximum, warp_total[warp] = state.sum;
#pragma unroll
        for (int e = 0; e < 16; e++) warp_out[warp][dimension(lane, e)] = state.out[e];
    }
    __syncthreads();

    float maximum = NOTHING, total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) maximum = fmaxf(maximum, warp_maximum[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += warp_total[w] * exp2_fast(warp_maximum[w] - maximum);
    u16* destination = out + (i64)row * WIDTH + head * HEAD_DIM;
    float* parts = PARTS > 1 ? partial + ((i64)row * NUM_HEADS + head) * PARTS * (HEAD_DIM + 2) : nullptr;
    for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * WARP) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += warp_out[w][d] * exp2_fast(warp_maximum[w] - maximum);
        if (PARTS == 1 || active == 1) {
            destination[d] = to_half(sum / total);
        } else {
            parts[part * (HEAD_DIM + 2) + d] = sum;
        }
    }
#if PARTS > 1
    if (active == 1) return;
    if (threadIdx.x == 0) {
        parts[part * (HEAD_DIM + 2) + HEAD_DIM] = maximum;
        parts[part * (HEAD_DIM + 2) + HEAD_DIM + 1] = total;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = counters + row * NUM_HEADS + head;
        is_last = atomicAdd(counter, 1) == active - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    maximum = NOTHING, total = 0.0f;
    for (int p = 0; p < active; p++) maximum = fmaxf(maximum, __ldcg(parts + p * (HEAD_DIM + 2) + HEAD_DIM));
    for (int p = 0; p < active; p++) {
        const float* one = parts + p * (HEAD_DIM + 2) + HEAD_DIM;
        total += __ldcg(one + 1) * exp2_fast(__ldcg(one) - maximum);
    }
    for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * WARP) {
        float sum = 0.0f;
        for (int p = 0; p < active; p++) {
            const float* one = parts + p * (HEAD_DIM + 2);
            sum += __ldcg(one + d) * exp2_fast(__ldcg(one + HEAD_DIM) - maximum);
        }
        destination[d] = to_half(sum / total);
    }
#endif
}
