// Facts of the CUDA devices, read once per device.
#pragma once

#include "host/plan.h"

namespace condensate {

// Fails with kUnsupported in a build without CUDA kernels.
Status cuda_device_facts(int device_index, DeviceFacts* facts);

// Makes a device current for its lifetime and restores the one before it.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device_index);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    const Status& status() const { return status_; }

  private:
    int restore_ = -1;  // the device to go back to, or -1
    Status status_;
};

}  // namespace condensate
