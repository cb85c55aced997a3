// From torch tensors to the core's plain parameters: argument checks, allocation, executor.
// A failed check throws; torch hands the text to Python as an exception.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "condensate/params.h"

namespace condensate::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor argument with the names that error messages use.
struct Argument {
    const char* op;
    const char* name;
    const Tensor& tensor;
};

// Throws std::invalid_argument (ValueError in Python) with "op: message".
[[noreturn]] void fail(const char* op, const std::string& message);
// Throws what a bad Status of the core means; does nothing for a good one.
void check_status(const Status& status);

std::string shape_string(const Tensor& tensor);

// [batch, heads, seq, head_dim] with a contiguous last dimension, any other strides.
ConstTensor4 view4(const Argument& argument);
DType element_type(const Argument& argument);
void check_same_type_and_device(const Argument& argument, const Argument& reference);
void check_contiguous(const Argument& argument, ScalarType type, const Argument& reference,
                      std::initializer_list<int64_t> sizes);

Selector parse_selector(const char* op, int64_t number);
// `scale` or 1/sqrt(head_dim).
float resolve_scale(const std::optional<double>& scale, int64_t head_dim);

// Sizes of query against key (value may be null), checked as far as output shapes depend on them;
// the core checks the rest.
struct Mask {
    int64_t window = 0;
    int64_t anchors = 0;
    bool causal = true;
    std::optional<double> scale;
};
Problem make_problem(const Argument& query, const Argument& key, const Mask& mask);
void check_value(const Argument& value, const Argument& key);

// An uninitialised contiguous tensor on the device of `like`.
Tensor allocate(const char* op, const Tensor& like, std::initializer_list<int64_t> sizes,
                ScalarType type);

// Runs on the device of `like`: torch's current stream, or torch's CPU threads.
Executor make_executor(const char* op, const Tensor& like);
Status make_cuda_executor(int device_index, Executor* executor);

}  // namespace condensate::ops
