// Hello is the smallest app: it answers every request with who it is.
package main

import (
	"cmp"
	"fmt"
	"log"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "hello from %s (%s), process %d\n", os.Getenv("FASTCONTAINER_INSTANCE"), os.Getenv("FASTCONTAINER_REVISION"), os.Getpid())
	})
	log.Fatal(http.ListenAndServe(":"+cmp.Or(os.Getenv("PORT"), "8080"), nil)) //nolint:gosec // the front door bounds its clients
}
