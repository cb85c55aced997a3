// What a plan reads beside the call: the environment, and the layout of tensors.
#include "host/environment.h"

#include <cstdlib>

#include <gtest/gtest.h>

#include "condensate/layout.h"

namespace condensate {
namespace {

TEST(Environment, NamesAPath) {
    Environment environment;
    unsetenv("CONDENSATE_FORCE_PATH");
    EXPECT_TRUE(read_environment(&environment).ok());
    EXPECT_FALSE(environment.forced);
    for (Path path : {Path::kCpuReference, Path::kCpu, Path::kSm80, Path::kSimt, Path::kSm90}) {
        setenv("CONDENSATE_FORCE_PATH", path_name(path), 1);
        EXPECT_TRUE(read_environment(&environment).ok());
        EXPECT_TRUE(environment.forced);
        EXPECT_EQ(environment.path, path);
    }
    setenv("CONDENSATE_FORCE_PATH", "gpu", 1);
    EXPECT_STREQ(
        read_environment(&environment).message,
        "CONDENSATE_FORCE_PATH is \"gpu\", expected cpu_reference, cpu, sm80, simt or sm90; "
        "unset it to let the plan choose.");
    unsetenv("CONDENSATE_FORCE_PATH");
}

TEST(Environment, TurnsStrictModeOn) {
    Environment environment;
    for (const char* value : {"1", "0", ""}) {
        setenv("CONDENSATE_STRICT", value, 1);
        EXPECT_TRUE(read_environment(&environment).ok());
        EXPECT_EQ(environment.strict, value[0] == '1');
    }
    unsetenv("CONDENSATE_STRICT");
}

TEST(Layout, AlignmentLooksAtPointersAndStridesInBytes) {
    alignas(16) char memory[64];
    const Extents extents = {2, 2, 2};
    ConstTensor4 tensor{memory, 64, 32, 8};
    EXPECT_TRUE(is_aligned16(tensor, DType::kFloat16, extents));
    tensor.stride_seq = 4;
    EXPECT_FALSE(is_aligned16(tensor, DType::kFloat16, extents));
    EXPECT_TRUE(is_aligned16(tensor, DType::kFloat32, extents));
    EXPECT_TRUE(is_aligned16(tensor, DType::kFloat16, {2, 2, 1}));  // never stepped over
    tensor.data = memory + 8;
    EXPECT_FALSE(is_aligned16(tensor, DType::kFloat32, extents));
    EXPECT_TRUE(is_aligned16(ConstTensor4{}, DType::kFloat32, extents));
    EXPECT_TRUE(is_aligned16(BlockMeans{memory, 64, 8}, DType::kFloat16, 2, 2));
    EXPECT_FALSE(is_aligned16(BlockMeans{memory, 64, 12}, DType::kFloat16, 2, 2));
    EXPECT_TRUE(is_aligned16(BlockMeans{memory, 64, 12}, DType::kFloat32, 2, 2));
}

TEST(Layout, TmaNeedsStridesAboveZero) {
    const ConstTensor4 dense = {nullptr, 4096, 1024, 64}, shared = {nullptr, 0, 1024, 64};
    EXPECT_TRUE(is_boxed(dense, {2, 4, 16}));
    EXPECT_FALSE(is_boxed(shared, {2, 4, 16}));
    EXPECT_TRUE(is_boxed(shared, {1, 4, 16}));  // the stride of an extent of 1 means nothing
}

}  // namespace
}  // namespace condensate
