"""What the student is asked: short, plain questions that a small model can have a go at."""

#: It trains on its answers to these.
PROMPTS = (
    "Why does the moon seem to change its shape over a month?",
    "Write two sentences that recommend a rainy-day activity for a six-year-old.",
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better.",
    "A shop sells pens at 2 euros each. How much do 7 pens cost, and why?",
    "Explain to a friend what a computer program is.",
    "How do bees make honey?",
    "Write a short, polite message to tell a colleague that the meeting is moved to Thursday.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Describe the smell of a bakery early in the morning.",
    "What should I check before I buy a used bicycle?",
    "Name four planets and say one thing about each.",
    "Turn this into a question: The library opens at nine.",
    "How do I boil an egg so that the yolk stays soft?",
    "Why do leaves turn red and yellow in autumn?",
    "Summarise in one sentence why washing your hands matters.",
)

#: Further ones, so that a longer training hears few of them twice.
MORE_PROMPTS = (
    "What is the capital of Italy, and what is it known for?",
    "How do airplanes stay in the air?",
    "Write a short poem about the wind.",
    "Why do we sleep?",
    "Explain what a library is to a child.",
    "What are the benefits of walking every day?",
    "How do I write a thank-you note?",
    "What is the difference between a frog and a toad?",
    "Name three fruits and their colours.",
    "Why does ice float on water?",
    "How do I grow tomatoes on a balcony?",
    "What is a good breakfast before a long hike?",
    "Tell me a fact about whales.",
    "How does a bicycle pump work?",
    "What is gravity?",
    "Give me an idea for a birthday present.",
)

#: It is judged by its answers to these, and never trains on them.
HELD_OUT = (
    "How does a rainbow form?",
    "What does a doctor do?",
    "Why is the sea salty?",
    "What is a volcano?",
    "Give me two tips for learning a new language.",
    "Describe a walk in a forest after rain.",
    "How can I save water at home?",
    "Tell me one thing about elephants.",
)
