#include "connection_threads.h"

#include <system_error>
#include <thread>

namespace chameleon::serve {

namespace {

// httplib waits with select(), which takes no descriptor of 1024 or more.
constexpr std::size_t kMaxConnections = 960;

}  // namespace

bool ConnectionThreads::enqueue(std::function<void()> serve_connection) {
  const std::lock_guard lock(mutex_);
  if (running_ == kMaxConnections) return false;
  try {
    std::thread([this, serve_connection = std::move(serve_connection)] {
      serve_connection();
      const std::lock_guard ending(mutex_);
      --running_;
      ended_.notify_all();  // under the lock, since this object may go as soon as it is released
    }).detach();
  } catch (const std::system_error&) {  // the system has no more threads
    return false;
  }
  ++running_;
  return true;
}

void ConnectionThreads::shutdown() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return running_ == 0; });
}

}  // namespace chameleon::serve
