// Every operator of the device: the CPU's, on the same memory.
//
// A tensor's memory is seen by the CPU's operator under a storage of its own, so views stay views and
// what is written is written in place. What the operator gives in new memory becomes the device's.
//
// As on other devices: tensors of one call are on one device, but for numbers (no dimensions) of the
// CPU; an operator whose result's shape depends on values waits for them.

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "device.h"

namespace host_device {
namespace {

bool is_ours(const at::Tensor& x) {
  return x.defined() && x.device().type() == kType;
}

at::Tensor tensor_of(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  at::Tensor x = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype()
  );
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return x;
}

// The device's tensors of a call, as the host sees them.
class Call {
 public:
  explicit Call(std::string name) : name_(std::move(name)) {}

  at::Tensor to_host(const at::Tensor& x, bool written = false) {
    if (!is_ours(x)) {
      if (x.defined() && x.dim() > 0 && x.device().is_cpu()) on_cpu_ = true;
      return x;
    }
    TORCH_CHECK(
        !device_ || *device_ == x.device(), name_, ": a tensor is on ", x.device(),
        ", and another on ", *device_
    );
    device_ = x.device();
    if (written) {
      const c10::DeviceGuard guard(x.device());
      x.storage().mutable_data(); // copies what is to be copied when it is written
    }
    tensors_.emplace_back(x, tensor_of(host_storage(x.storage()), c10::DispatchKey::CPU, x));
    return tensors_.back().second;
  }

  c10::Device to_host(c10::Device device) {
    if (device.type() != kType) return device;
    device_ = c10::Device(kType, device.has_index() ? device.index() : current_device());
    return c10::kCPU;
  }

  void check() const {
    TORCH_CHECK(!(device_ && on_cpu_), name_, ": a tensor is on cpu, and another on ", *device_);
  }

  at::Tensor to_device(const at::Tensor& x) {
    if (!x.defined() || !device_ || !x.device().is_cpu()) return x;
    for (const auto& [original, host] : tensors_) {
      if (host.is_same(x)) return original;
    }
    for (const auto& [device, host] : storages_) {
      if (host.is_alias_of(x.storage())) return tensor_of(device, c10::DispatchKey::PrivateUse1, x);
    }
    const c10::Storage host = x.storage();
    const size_t bytes = host.nbytes();
    c10::Storage device(
        c10::make_intrusive<c10::StorageImpl>(
            c10::StorageImpl::use_byte_size_t(), bytes, as_device_memory(host, *device_),
            &allocator(), true
        )
    );
    storages_.emplace_back(device, host);
    return tensor_of(device, c10::DispatchKey::PrivateUse1, x);
  }

  // What the operator resized.
  void update() {
    for (auto& [device, host] : storages_) {
      if (device.data() == host.data()) continue;
      // The host's storage has other memory now, and no tie to the device's.
      c10::Storage moved(
          c10::make_intrusive<c10::StorageImpl>(
              c10::StorageImpl::use_byte_size_t(), host.nbytes(), host.set_data_ptr(c10::DataPtr()),
              c10::GetCPUAllocator(), true
          )
      );
      const size_t bytes = moved.nbytes();
      device.unsafeGetStorageImpl()->set_data_ptr_noswap(as_device_memory(moved, *device_));
      device.unsafeGetStorageImpl()->set_nbytes(bytes);
    }
    for (auto& [original, host] : tensors_) {
      if (original.sizes() == host.sizes() && original.strides() == host.strides()) continue;
      original.unsafeGetTensorImpl()->set_sizes_and_strides(
          host.sizes(), host.strides(), host.storage_offset()
      );
    }
  }

  std::optional<c10::Device> device() const {
    return device_;
  }

 private:
  c10::Storage host_storage(const c10::Storage& device) {
    for (const auto& [ours, host] : storages_) {
      if (ours.is_alias_of(device)) return host;
    }
    c10::DataPtr data(
        const_cast<void*>(device.data()), new c10::Storage(device),
        [](void* storage) { delete static_cast<c10::Storage*>(storage); }, c10::kCPU
    );
    c10::Storage host(
        c10::make_intrusive<c10::StorageImpl>(
            c10::StorageImpl::use_byte_size_t(), device.nbytes(), std::move(data),
            c10::GetCPUAllocator(), true
        )
    );
    storages_.emplace_back(device, host);
    return host;
  }

  std::string name_;
  std::optional<c10::Device> device_;
  bool on_cpu_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_; // the device's, the host's
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

bool is_mask(const at::Tensor& x) {
  return x.defined() && (x.scalar_type() == at::kBool || x.scalar_type() == at::kByte);
}

// Whether the shape of what it gives depends on values, or it reads them.
bool waits(const std::string& name, const torch::jit::Stack& arguments) {
  constexpr std::string_view names[] = {
      "aten::_local_scalar_dense",
      "aten::_unique2",
      "aten::bincount",
      "aten::equal",
      "aten::masked_select",
      "aten::nonzero",
      "aten::unique_consecutive",
      "aten::unique_dim",
      "aten::unique_dim_consecutive",
  };
  if (std::ranges::find(names, name) != std::end(names)) return true;
  if (name == "aten::repeat_interleave") return arguments.back().isNone(); // its result's size
  if (!name.starts_with("aten::index") && !name.starts_with("aten::_index_put")) return false;
  return std::ranges::any_of(arguments, [](const c10::IValue& argument) {
    if (!argument.isOptionalTensorList()) return false;
    const auto indices = argument.toOptionalTensorVector();
    return std::ranges::any_of(indices, [](const auto& x) { return x && is_mask(*x); });
  });
}

// While it exists, what takes no generator draws the device's numbers.
class DrawsFrom {
 public:
  explicit DrawsFrom(const at::Generator& generator)
      : device_(on_host(generator)), before_(cpu_.get_state()) {
    cpu_.set_state(device_.get_state());
  }
  ~DrawsFrom() {
    device_.set_state(cpu_.get_state());
    cpu_.set_state(before_);
  }

 private:
  at::Generator cpu_ = at::detail::getDefaultCPUGenerator();
  at::Generator device_;
  at::Tensor before_;
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  const torch::jit::Stack arguments(stack->begin() + first, stack->end());
  if (waits(schema.name(), arguments)) note_synchronisation(schema.name());

  Call call(schema.name());
  std::optional<size_t> generator;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& argument = (*stack)[first + i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (argument.isTensor()) {
      argument = call.to_host(argument.toTensor(), written);
    } else if (argument.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : argument.toTensorVector())
        list.push_back(call.to_host(x, written));
      argument = list;
    } else if (argument.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& x : argument.toOptionalTensorVector()) {
        list.push_back(x ? std::optional(call.to_host(*x)) : std::nullopt);
      }
      argument = list;
    } else if (argument.isDevice()) {
      argument = call.to_host(argument.toDevice());
    } else if (schema.arguments()[i].name() == "generator") {
      generator = i;
    }
  }
  call.check();
  TORCH_CHECK(call.device(), schema.name(), ": no argument says which device");
  if (generator) {
    c10::IValue& argument = (*stack)[first + *generator];
    const at::Generator g =
        argument.isGenerator() ? argument.toGenerator() : default_generator(call.device()->index());
    TORCH_CHECK(
        g.device() == *call.device(), schema.name(), ": expected a generator of ", *call.device(),
        ", got one of ", g.device()
    );
    argument = on_host(g);
  }
  {
    std::optional<DrawsFrom> draws;
    if (!generator && op.hasTag(at::Tag::nondeterministic_seeded)) {
      draws.emplace(default_generator(call.device()->index()));
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.update();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& result = (*stack)[i];
    if (result.isTensor()) {
      result = call.to_device(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : result.toTensorVector()) list.push_back(call.to_device(x));
      result = list;
    }
  }
}

c10::Device device_of(std::optional<c10::Device> device) {
  TORCH_CHECK(device, "a tensor of this device is made without its device");
  return {kType, c10::DeviceIndex(device->has_index() ? device->index() : current_device())};
}

at::Tensor empty(
    c10::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format
) {
  const c10::DeviceGuard guard(device_of(device));
  return at::detail::empty_generic(
      sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format
  );
}

at::Tensor empty_strided(
    c10::IntArrayRef sizes,
    c10::IntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>
) {
  const c10::DeviceGuard guard(device_of(device));
  return at::detail::empty_strided_generic(
      sizes, strides, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype)
  );
}

// Elsewhere it has no memory.
at::Tensor zeros(
    c10::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<c10::Device> device,
    std::optional<bool> pinned
) {
  return empty(sizes, dtype, layout, device, pinned, std::nullopt).zero_();
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (is_ours(from) && to.device().is_cpu()) note_synchronisation("a copy to the CPU");
  // Each in a call of its own: they may be on two devices.
  Call source("copy_"), destination("copy_");
  destination.to_host(to, true).copy_(source.to_host(from), non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(
    at::Tensor& x,
    c10::Storage storage,
    int64_t offset,
    c10::IntArrayRef sizes,
    c10::IntArrayRef strides
) {
  auto* impl = x.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.data() == nullptr) {
    impl->set_sizes_contiguous(sizes);
    impl->set_storage_offset(offset);
  } else {
    impl->set_sizes_and_strides(sizes, strides, offset);
  }
  return x;
}

at::Tensor& set_whole_storage(at::Tensor& x, c10::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / x.element_size());
  return set_storage(x, std::move(storage), 0, {elements}, {});
}

at::Tensor& set_tensor(at::Tensor& x, const at::Tensor& source) {
  return set_storage(
      x, source.storage(), source.storage_offset(), source.sizes(), source.strides()
  );
}

// Convolutions of devices that PyTorch has no kernels for come here.
at::Tensor convolution(
    const at::Tensor& x,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups
) {
  Call call("convolution");
  const at::Tensor b = bias ? *bias : at::Tensor();
  const at::Tensor on_host[] = {call.to_host(x), call.to_host(weight), call.to_host(b)};
  call.check();
  return call.to_device(
      at::convolution(
          on_host[0], on_host[1], on_host[2], stride, padding, dilation, transposed, output_padding,
          groups
      )
  );
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gy,
    const at::Tensor& x,
    const at::Tensor& weight,
    c10::IntArrayRef stride,
    c10::IntArrayRef padding,
    c10::IntArrayRef dilation,
    bool transposed,
    c10::IntArrayRef output_padding,
    int64_t groups,
    std::array<bool, 3> mask
) {
  Call call("convolution_backward");
  const at::Tensor on_host[] = {call.to_host(gy), call.to_host(x), call.to_host(weight)};
  call.check();
  const c10::IntArrayRef bias_sizes(&on_host[0].sizes()[1], 1);
  const auto [gx, gweight, gbias] = at::convolution_backward(
      on_host[0], on_host[1], on_host[2], bias_sizes, stride, padding, dilation, transposed,
      output_padding, groups, mask
  );
  return {call.to_device(gx), call.to_device(gweight), call.to_device(gbias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &zeros);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

using at::autocast::CastPolicy;
using at::autocast::WrapFunction;

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// PyTorch's lists expect its names.
using namespace at;

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define HOST_DEVICE_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define HOST_DEVICE_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define HOST_DEVICE_SET_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define HOST_DEVICE_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(HOST_DEVICE_LOWER)
  AT_FORALL_FP32(HOST_DEVICE_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(HOST_DEVICE_SET_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(HOST_DEVICE_PROMOTE)
}

} // namespace
} // namespace host_device
