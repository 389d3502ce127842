// A device of torch's, "memory", of which there are two, memory:0 and memory:1: their tensors lie in the host's memory and
// are computed with by the CPU's functions, and what is given tensors of several devices fails as it does on GPUs.
//
// Made of what torch offers for devices outside of it (its PrivateUse1): an allocator, a guard, hooks, the functions that
// make and view memory, and for all else a fallback to the CPU.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kCount = 2;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    current = device.index();
    return before;
  }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  // One stream a device, in which everything is done when a call returns.
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    return {memory, memory, &std::free, c10::Device(kDevice, current)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kCount; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>(0);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    c10::OptionalDeviceGuard guard(storage.device());
    auto memory = allocator.allocate(bytes);
    if (held->nbytes()) std::memcpy(memory.get(), held->data(), std::min<size_t>(bytes, held->nbytes()));
    held->set_data_ptr_noswap(std::move(memory));
    held->set_nbytes(bytes);
  }
};
struct Registered {
  Registered() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
} registered;

c10::Device device_of(std::optional<c10::Device> given) {
  return given && given->has_index() ? *given : c10::Device(kDevice, current);
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device_of(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device_of(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The same memory, as a tensor of the CPU's.
at::Tensor on_the_cpu(const at::Tensor& x) {
  if (x.device().is_cpu()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [x](void*) {},
                       x.options().device(at::kCPU).requires_grad(false));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView guard;
  on_the_cpu(to).copy_(on_the_cpu(from));
  return to;
}

const at::Tensor& resize(const at::Tensor& x, at::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t numbers = x.storage_offset();
  numbers += c10::multiply_integers(sizes);
  size_t bytes = numbers * x.element_size();
  if (x.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(x.storage(), bytes);
  x.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return x;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor as_strided(const at::Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> at_number;
  if (offset) at_number = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at_number);
}

at::Tensor view(const at::Tensor& x, c10::SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor unfold(const at::Tensor& x, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(x, dim, size, step);
}

at::Tensor& set_at(at::Tensor& x, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                   c10::SymIntArrayRef stride) {
  TORCH_CHECK(storage.device() == x.device(), "a tensor of ", x.device(), " and memory of ", storage.device());
  auto* held = x.unsafeGetTensorImpl();
  held->set_storage_keep_dtype(storage);
  held->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  if (stride.empty()) {
    held->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  } else {
    held->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  }
  return x;
}

at::Tensor& set_all(at::Tensor& x, at::Storage storage) {
  std::vector<c10::SymInt> size{static_cast<int64_t>(storage.nbytes() / x.element_size())};
  return set_at(x, storage, 0, size, {});
}

// Any other function, computed by the CPU's: where all tensors are of one device. A single number may be the CPU's, and
// so may the indices, as on a GPU.
void fallback(const c10::OperatorHandle& function, torch::jit::Stack* stack) {
  const auto& name = function.schema().name();
  bool indexes = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  std::optional<c10::Device> device;
  auto see = [&](const at::Tensor& x) {
    if (!x.defined() || (x.device().is_cpu() && (x.dim() == 0 || indexes))) return;
    TORCH_CHECK(!device || *device == x.device(), "Expected all tensors to be on the same device, but found ",
                *device, " and ", x.device(), " in ", name);
    device = x.device();
  };
  for (const auto& each : torch::jit::last(*stack, function.schema().arguments().size())) {
    if (each.isTensor()) see(each.toTensor());
    if (each.isTensorList()) for (const auto& x : each.toTensorVector()) see(x);
    if (each.isOptionalTensorList()) {
      for (std::optional<at::Tensor> x : each.toOptionalTensorList()) if (x) see(*x);
    }
  }
  at::native::cpu_fallback(function, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("set_.source_Storage", &set_all);
  m.impl("set_.source_Storage_storage_offset", &set_at);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

extern "C" int memory_current() { return current; }
extern "C" void memory_set_current(int index) { current = static_cast<c10::DeviceIndex>(index); }
