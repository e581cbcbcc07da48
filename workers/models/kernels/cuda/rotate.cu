// Rotates queries and keys of the fused projection in place and writes keys and values to the cache. One warp a head of a
// token. Given at compile time: HEAD_DIM, NUM_HEADS, BLOCK_SIZE, KV_INT8, STORE.
#include "device.cuh"
#include "rotary.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
rotate_and_store(u16* qkv, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                 const i64* __restrict__ positions, const i64* __restrict__ slots, void* keys, void* values, u16* key_scales,
                 u16* value_scales, int num_tokens) {
    const int lane = threadIdx.x % WARP;
    const int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    allow_next_kernel();
    wait_for_previous_kernel();
    if (index >= num_tokens * NUM_HEADS) return;
    const int token = index / NUM_HEADS, head = index % NUM_HEADS;
    const i64 first = positions[token], second = positions[num_tokens + token];
    u16* heads = qkv + (i64)index * 3 * HEAD_DIM;
    const Quarters q = rotate(load_quarters(heads, lane), cos_table, sin_table, first, second, lane);
    const Quarters k = rotate(load_quarters(heads + HEAD_DIM, lane), cos_table, sin_table, first, second, lane);
    store_quarters(q, heads, lane);
    store_quarters(k, heads + HEAD_DIM, lane);
#if STORE
    const i64 slot = slots[token];
    const i64 vector = (slot / BLOCK_SIZE * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE;
    store_in_cache(k, keys, key_scales, vector, lane);
    store_in_cache(load_quarters(heads + 2 * HEAD_DIM, lane), values, value_scales, vector, lane);
#endif
}
