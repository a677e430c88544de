Rails.application.routes.draw do
  root "posts#index"
  get "who", to: "who#show"
end
