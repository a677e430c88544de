require "securerandom"
require "socket"

# Tells one instance from another, and from its copy.
class WhoController < ApplicationController
  def show
    render json: { pid: Process.pid, hostname: Socket.gethostname, random: Random.rand, secure: SecureRandom.hex(16) }
  end
end
