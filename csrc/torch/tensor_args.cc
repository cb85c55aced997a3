#include "torch/tensor_args.h"

#include <cctype>
#include <cmath>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "condensate/geometry.h"
#include "condensate/selectors.h"
#include "host/validate.h"

namespace condensate::ops {
namespace {

bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

std::string device_string(const Tensor& tensor) {
    return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "cpu";
}

std::string sizes_string(const int64_t* sizes, size_t count) {
    std::ostringstream text;
    text << "[";
    for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
    text << "]";
    return text.str();
}

// torch's Python name of a dtype.
std::string dtype_string(ScalarType type) {
    switch (type) {
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::ComplexFloat:
            return "complex64";
        case ScalarType::ComplexDouble:
            return "complex128";
        default:
            break;
    }
    std::string name = toString(type);  // as Float8_e4m3fn
    for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return name;
}

}  // namespace

void fail(const char* op, const std::string& message) {
    throw std::invalid_argument(std::string(op) + ": " + message);
}

void check_status(const Status& status) {
    if (status.ok()) return;
    if (status.code == StatusCode::kInvalidArgument) throw std::invalid_argument(status.message);
    throw std::runtime_error(status.message);
}

std::string shape_string(const Tensor& tensor) {
    return sizes_string(tensor.sizes().data(), tensor.sizes().size());
}

ConstTensor4 view4(const Argument& a) {
    if (a.tensor.dim() != 4)
        fail(a.op, std::string(a.name) + " has shape " + shape_string(a.tensor) +
                       ", expected 4 dimensions [batch, heads, seq, head_dim]; reshape it, or use "
                       "unsqueeze(0) where there is no batch.");
    if (a.tensor.stride(3) != 1 && a.tensor.size(3) > 1 && a.tensor.numel() > 0)
        fail(a.op, std::string(a.name) + " has stride " + std::to_string(a.tensor.stride(3)) +
                       " in its last dimension, expected 1 (head_dim contiguous); call " + a.name +
                       ".contiguous() first.");
    return {a.tensor.const_data_ptr(), a.tensor.stride(0), a.tensor.stride(1), a.tensor.stride(2)};
}

DType element_type(const Argument& a) {
    switch (a.tensor.scalar_type()) {
        case ScalarType::Half:
            return DType::kFloat16;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        case ScalarType::Float:
            return DType::kFloat32;
        default:
            break;
    }
    fail(a.op, std::string(a.name) + " has dtype " + dtype_string(a.tensor.scalar_type()) +
                   ", expected float16, bfloat16 or float32; convert it with " + a.name + ".to().");
}

void check_same_type_and_device(const Argument& a, const Argument& reference) {
    if (a.tensor.scalar_type() != reference.tensor.scalar_type())
        fail(a.op, std::string(a.name) + " has dtype " + dtype_string(a.tensor.scalar_type()) +
                       " and " + reference.name + " has " +
                       dtype_string(reference.tensor.scalar_type()) +
                       ", expected one dtype; nothing is cast silently, convert one with .to().");
    if (!same_device(a.tensor, reference.tensor))
        fail(a.op, std::string(a.name) + " is on " + device_string(a.tensor) + " and " +
                       reference.name + " on " + device_string(reference.tensor) +
                       ", expected one device; move one with .to().");
}

void check_contiguous(const Argument& a, ScalarType type, const Argument& reference,
                      std::initializer_list<int64_t> sizes) {
    if (a.tensor.scalar_type() != type)
        fail(a.op, std::string(a.name) + " has dtype " + dtype_string(a.tensor.scalar_type()) +
                       ", expected " + dtype_string(type) + "; convert it with .to().");
    if (!same_device(a.tensor, reference.tensor))
        fail(a.op, std::string(a.name) + " is on " + device_string(a.tensor) + " and " +
                       reference.name + " on " + device_string(reference.tensor) +
                       ", expected one device; move one with .to().");
    const auto actual = a.tensor.sizes();
    bool equal = actual.size() == sizes.size();
    for (size_t i = 0; equal && i < sizes.size(); ++i) equal = actual[i] == sizes.begin()[i];
    if (!equal)
        fail(a.op, std::string(a.name) + " has shape " + shape_string(a.tensor) + ", expected " +
                       sizes_string(sizes.begin(), sizes.size()) +
                       " to fit the other arguments; check which call it comes from.");
    if (!a.tensor.is_contiguous())
        fail(a.op, std::string(a.name) + " is not contiguous, expected a contiguous tensor; call " +
                       a.name + ".contiguous() first.");
}

Selector parse_selector(const char* op, int64_t number) {
    std::string known;  // "0 (a), 1 (b) or 2 (c)"
    for (Selector selector : kSelectors) {
        const auto own = static_cast<int64_t>(selector);
        if (number == own) return selector;
        const bool last = selector == kSelectors[std::size(kSelectors) - 1];
        if (own > 0) known += last ? " or " : ", ";
        known += std::to_string(own) + " (" + selector_traits(selector).name + ")";
    }
    fail(op,
         "selector is " + std::to_string(number) + ", expected " + known + "; 0 is the default.");
}

float resolve_scale(const std::optional<double>& scale, int64_t head_dim) {
    if (scale.has_value()) return static_cast<float>(*scale);
    return head_dim > 0 ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))) : 1.0f;
}

Problem make_problem(const Argument& query, const Argument& key, const Mask& mask) {
    const Tensor &q = query.tensor, &k = key.tensor;
    Problem problem;
    problem.dtype = element_type(query);
    check_same_type_and_device(key, query);
    if (q.size(0) != k.size(0) || q.size(3) != k.size(3))
        fail(key.op, std::string(key.name) + " has shape " + shape_string(k) + " and query " +
                         shape_string(q) +
                         ", expected the same batch and head_dim; check that both are [batch, " +
                         "heads, seq, head_dim].");
    check_status(validate_heads(query.op, q.size(1), key.name, k.size(1)));
    problem.batch = q.size(0);
    problem.query_heads = q.size(1);
    problem.kv_heads = k.size(1);
    problem.query_len = q.size(2);
    problem.kv_len = k.size(2);
    problem.head_dim = q.size(3);
    problem.window = mask.window;
    problem.anchors = mask.anchors;
    problem.causal = mask.causal;
    problem.scale = resolve_scale(mask.scale, problem.head_dim);
    return problem;
}

void check_value(const Argument& value, const Argument& key) {
    check_same_type_and_device(value, key);
    for (int i = 0; i < 4; ++i)
        if (value.tensor.size(i) != key.tensor.size(i))
            fail(value.op, std::string(value.name) + " has shape " + shape_string(value.tensor) +
                               " and key " + shape_string(key.tensor) +
                               ", expected equal shapes; pad the smaller head_dim with zeros if "
                               "only that differs.");
}

Tensor allocate(const char* op, const Tensor& like, std::initializer_list<int64_t> sizes,
                ScalarType type) {
    constexpr size_t kMaxDims = 4;
    int64_t strides[kMaxDims] = {};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
    }
    const int32_t device_type =
        like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
    const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle = nullptr;
    // The direct entry: a call through the dispatcher costs microseconds more on every operator.
    if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, code,
                                 device_type, like.get_device_index(), &handle) != TORCH_SUCCESS)
        throw std::runtime_error(std::string(op) + ": torch could not allocate a " +
                                 dtype_string(type) + " tensor of shape " +
                                 sizes_string(sizes.begin(), sizes.size()) + " on " +
                                 device_string(like) +
                                 " (its message is on standard error); free memory or split the "
                                 "call by batch, heads or queries.");
    return Tensor(handle);
}

}  // namespace condensate::ops
