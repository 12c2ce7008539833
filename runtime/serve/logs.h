// One log line per request, with its id; never a prompt unless that was asked for.
#pragma once

#include <optional>
#include <string>

#include "errors.h"

namespace chameleon::serve {

/// Writes lines to standard error: text, or one JSON object each. Any thread may log.
class Log {
 public:
  explicit Log(bool as_json) : as_json_(as_json) {}

  /// fields: more about the message, an object
  void info(const std::string& message, const Json& fields = Json::object()) const { write("info", message, fields); }
  void error(const std::string& message, const Json& fields = Json::object()) const { write("error", message, fields); }

 private:
  void write(const char* level, const std::string& message, const Json& fields) const;

  bool as_json_;
};

/// The client's own id where it is one, else a new one of 32 hexadecimal digits.
std::string request_id(const std::string& given);

}  // namespace chameleon::serve
