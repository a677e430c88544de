bind "tcp://0.0.0.0:#{ENV.fetch("PORT", 8080)}"
environment ENV.fetch("RAILS_ENV")
threads 5, 5
# The signal is the usual way to end, and process 1 cannot die of it.
raise_exception_on_sigterm false
