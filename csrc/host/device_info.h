// Facts of the CUDA devices, read once per device.
#pragma once

#include "condensate/types.h"

namespace condensate {

// What a plan may know of a device; all zero for the CPU.
struct DeviceFacts {
    bool cuda = false;
    int index = 0;
    int sm_major = 0;
    int sm_minor = 0;
    int sm_count = 0;
    int max_smem_per_block_bytes = 0;  // opt-in limit
    bool sm90a_kernels = false;        // this build holds them
};

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
