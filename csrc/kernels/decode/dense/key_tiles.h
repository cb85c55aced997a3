// A warp's own pipeline of key and value tiles: every kWarps-th 16-key tile of a split, copied by
// cp.async into stages that no other warp touches.
#pragma once

#include "condensate/decode.h"
#include "kernels/decode/dense/traits.h"
#include "kernels/decode/dense/work.h"

namespace condensate::kernels::decode {

template <class Traits>
class KeyTiles {
  public:
    using Element = typename Traits::Element;
    using Stage = typename Traits::Stage;

    __device__ KeyTiles(const KvCache& cache, const WorkItem& item, Stage* stages)
        : cache_(cache),
          batch_(item.batch),
          kv_head_(item.kv_head),
          begin_(item.begin + Traits::kTileKeys * static_cast<int>(threadIdx.x / 32)),
          end_(item.end),
          stages_smem_(ptx::smem_address(stages)) {}

    __device__ int count() const {
        return end_ > begin_ ? (end_ - begin_ + kStride - 1) / kStride : 0;
    }
    __device__ int first_key(int n) const { return begin_ + n * kStride; }
    // Does tile n, loaded and not long ago, have a page?
    __device__ bool exists(int n) const { return valid_ >> (n & 31) & 1; }
    __device__ uint32_t k_smem(int n) const { return stage_smem(n) + offsetof(Stage, k); }
    __device__ uint32_t v_smem(int n) const { return stage_smem(n) + offsetof(Stage, v); }

    // Starts the copy of tile n; n counts up from 0. What is not there becomes zero.
    __device__ void load(int n, uint32_t* error_word) {
        if ((n & 31) == 0) look_up(n, error_word);
        const auto* key = shuffle(key_, n & 31);
        const auto* value = shuffle(value_, n & 31);
        const uint32_t bit = 1u << (n & 31);
        valid_ = key ? valid_ | bit : valid_ & ~bit;
        const int keys = key ? end_ - first_key(n) : 0;
        copy_tile(k_smem(n), key, cache_.key_stride_token, keys);
        copy_tile(v_smem(n), value, cache_.value_stride_token, keys);
    }

  private:
    static constexpr unsigned kAll = 0xffffffffu;
    static constexpr int kStride = Traits::kTileKeys * Traits::kWarps;

    __device__ uint32_t stage_smem(int n) const {
        return stages_smem_ + n % Traits::kStages * static_cast<uint32_t>(sizeof(Stage));
    }
    __device__ static const Element* shuffle(const Element* pointer, int lane) {
        return reinterpret_cast<const Element*>(
            __shfl_sync(kAll, reinterpret_cast<unsigned long long>(pointer), lane));
    }

    // Rows from `keys` on become zero; nothing is read of them.
    __device__ static void copy_tile(uint32_t tile_smem, const Element* src, int64_t stride,
                                     int keys) {
        constexpr int kChunks = Traits::kChunks, kPasses = kChunks * Traits::kTileKeys / 32;
        const int lane = threadIdx.x & 31;
        if constexpr (32 % kChunks == 0) {
            // Rows of a lane differ in bits that its first row does not have, so that the swizzle
            // changes by a constant.
            constexpr int kRowsPerPass = 32 / kChunks;
            const int row = lane / kChunks, chunk = lane % kChunks;
            const uint32_t dst = tile_smem + device::tile_offset<Traits::kPitch>(row, chunk);
            src += row * stride + chunk * Traits::kChunkElems;
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int rows = pass * kRowsPerPass;
                ptx::cp_async_16((dst ^ ((rows & 7) << 4)) + rows * Traits::kPitchBytes, src,
                                 row + rows < keys);
                src += kRowsPerPass * stride;
            }
        } else {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int row = (lane + 32 * pass) / kChunks, chunk = (lane + 32 * pass) % kChunks;
                ptx::cp_async_16(tile_smem + device::tile_offset<Traits::kPitch>(row, chunk),
                                 src + row * stride + chunk * Traits::kChunkElems, row < keys);
            }
        }
    }

    // The addresses of tiles [n, n + 32), one a lane; null where there is no page.
    __device__ void look_up(int n, uint32_t* error_word) {
        const int key = first_key(n + static_cast<int>(threadIdx.x & 31));
        key_ = value_ = nullptr;
        if (key >= end_) return;
        const int page_size = static_cast<int>(cache_.page_size);
        const int column = cache_.block_table ? key / page_size : 0;
        const int slot = key - column * page_size;
        const int64_t page = cache_.block_table
                                 ? __ldg(cache_.block_table + batch_ * cache_.max_pages + column)
                                 : batch_;
        if (page < 0 || page >= cache_.num_pages) {
            atomicOr(error_word, kErrorBlockTable);
            return;
        }
        key_ = static_cast<const Element*>(cache_.key) + page * cache_.key_stride_page +
               kv_head_ * cache_.key_stride_head + slot * cache_.key_stride_token;
        value_ = static_cast<const Element*>(cache_.value) + page * cache_.value_stride_page +
                 kv_head_ * cache_.value_stride_head + slot * cache_.value_stride_token;
    }

    const KvCache& cache_;
    const int batch_, kv_head_;
    const int begin_, end_;  // keys
    const uint32_t stages_smem_;
    const Element *key_ = nullptr, *value_ = nullptr;
    uint32_t valid_ = 0;  // of the last 32 tiles, those that have pages
};

}  // namespace condensate::kernels::decode
