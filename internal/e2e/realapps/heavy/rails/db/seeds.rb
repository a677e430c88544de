Post.create!([{ title: "the first" }, { title: "the second" }])
