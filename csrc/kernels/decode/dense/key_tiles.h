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
          begin_(item.begin + Traits::kTileKeys * static_cast<int>(threadIdx.x / 32)),
          end_(item.end),
          key_(static_cast<const Element*>(cache.key) + item.kv_head * cache.key_stride_head),
          value_(static_cast<const Element*>(cache.value) + item.kv_head * cache.value_stride_head),
          table_(cache.block_table ? cache.block_table + item.batch * cache.max_pages : nullptr),
          only_page_(item.batch),
          stages_smem_(ptx::smem_address(stages)) {}

    __device__ int count() const {
        return end_ > begin_ ? (end_ - begin_ + kStride - 1) / kStride : 0;
    }
    __device__ int first_key(int n) const { return begin_ + n * kStride; }
    // Does tile n, loaded and not long ago, have a page?
    __device__ bool exists(int n) const { return valid_ >> (n & 63) & 1; }
    __device__ uint32_t k_smem(int n) const { return stage_smem(n) + offsetof(Stage, k); }
    __device__ uint32_t v_smem(int n) const { return stage_smem(n) + offsetof(Stage, v); }

    // Starts the copy of tile n; n counts up from 0. What is not there becomes zero.
    __device__ void load(int n, uint32_t* errors) {
        if ((n & 31) == 0) look_up(n, errors);
        const int lane = threadIdx.x & 31;
        const Element* k = key_ + __shfl_sync(kAll, key_offset_, n & 31);
        const Element* v = value_ + __shfl_sync(kAll, value_offset_, n & 31);
        const int keys = exists(n) ? end_ - first_key(n) : 0;
        const uint32_t stage = stage_smem(n);
#pragma unroll
        for (int pass = 0; pass < Traits::kChunks * Traits::kTileKeys / 32; ++pass) {
            const int i = lane + 32 * pass, row = i / Traits::kChunks, chunk = i % Traits::kChunks;
            const bool copy = row < keys;
            const uint32_t offset = device::tile_offset<Traits::kPitch>(row, chunk);
            const int elem = chunk * Traits::kChunkElems;
            ptx::cp_async_16(stage + offsetof(Stage, k) + offset,
                             copy ? k + row * cache_.key_stride_token + elem : key_, copy);
            ptx::cp_async_16(stage + offsetof(Stage, v) + offset,
                             copy ? v + row * cache_.value_stride_token + elem : value_, copy);
        }
    }

  private:
    static constexpr unsigned kAll = 0xffffffffu;
    static constexpr int kStride = Traits::kTileKeys * Traits::kWarps;

    __device__ uint32_t stage_smem(int n) const {
        return stages_smem_ + n % Traits::kStages * static_cast<uint32_t>(sizeof(Stage));
    }

    // Offsets of tiles [n, n + 32), one a lane.
    __device__ void look_up(int n, uint32_t* errors) {
        const int lane = threadIdx.x & 31, key = first_key(n + lane);
        bool valid = false;
        key_offset_ = value_offset_ = 0;
        if (key < end_) {
            const int page_size = static_cast<int>(cache_.page_size);
            const int column = table_ ? key / page_size : 0, slot = key - column * page_size;
            const int64_t page = table_ ? __ldg(table_ + column) : only_page_;
            valid = page >= 0 && page < cache_.num_pages;
            if (valid) {
                key_offset_ = page * cache_.key_stride_page + slot * cache_.key_stride_token;
                value_offset_ = page * cache_.value_stride_page + slot * cache_.value_stride_token;
            } else {
                *errors |= kErrorBlockTable;
            }
        }
        const uint64_t bits = __ballot_sync(kAll, valid);
        valid_ = n & 32 ? (valid_ & 0xffffffffu) | bits << 32 : valid_ >> 32 << 32 | bits;
    }

    const KvCache& cache_;
    const int begin_, end_;  // keys
    const Element *key_, *value_;
    const int32_t* table_;
    const int32_t only_page_;
    const uint32_t stages_smem_;
    int64_t key_offset_ = 0, value_offset_ = 0;
    uint64_t valid_ = 0;  // tiles that have pages, of the last 64
};

}  // namespace condensate::kernels::decode
