import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.SecureRandom;
import java.util.HexFormat;
import javax.servlet.http.HttpServlet;
import javax.servlet.http.HttpServletRequest;
import javax.servlet.http.HttpServletResponse;
import org.eclipse.jetty.server.Server;
import org.eclipse.jetty.servlet.ServletContextHandler;
import org.eclipse.jetty.servlet.ServletHolder;

/** Two servlets in an embedded Jetty. */
public class Main {
    public static void main(String[] args) throws Exception {
        var context = new ServletContextHandler();
        context.addServlet(new ServletHolder(new Hello()), "/");
        context.addServlet(new ServletHolder(new Who()), "/who");
        var server = new Server(new InetSocketAddress("0.0.0.0", Integer.parseInt(System.getenv().getOrDefault("PORT", "8080"))));
        server.setHandler(context);
        server.setStopAtShutdown(true);
        server.start();
        server.join();
    }

    static class Hello extends HttpServlet {
        @Override
        protected void doGet(HttpServletRequest req, HttpServletResponse resp) throws IOException {
            resp.setContentType("text/html");
            resp.getWriter().println("<h1>hello jvm</h1>");
        }
    }

    /** Tells one instance from another, and from its copy. */
    static class Who extends HttpServlet {
        private final SecureRandom random = new SecureRandom();

        @Override
        protected void doGet(HttpServletRequest req, HttpServletResponse resp) throws IOException {
            var secure = new byte[16];
            random.nextBytes(secure);
            resp.setContentType("application/json");
            // The kernel is asked: a name in the environment is that of the first copy.
            var hostname = Files.readString(Path.of("/proc/sys/kernel/hostname")).strip();
            resp.getWriter().printf("{\"pid\":%d,\"hostname\":\"%s\",\"random\":%s,\"secure\":\"%s\"}",
                    ProcessHandle.current().pid(), hostname, Math.random(), HexFormat.of().formatHex(secure));
        }
    }
}
